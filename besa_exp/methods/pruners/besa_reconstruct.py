"""BESA with weights that move: the sparsity of every row and the kept weights are learned together, block by block.

BESA (Xu et al., arXiv 2402.16880) learns how much each row gives up while the weights stay as they are. But what a row
can give up depends on what the kept weights then do about it: a mask learned for fixed weights and updated afterwards
is worse than SparseGPT alone. So here

1. SparseGPT (arXiv 2301.00774) prunes the block to the share `start` of the target, updating what it keeps;
2. the rest goes while the kept weights are tuned under the block's reconstruction loss (`besa_exp.methods.tuning`):
   every few steps the weights of the whole block whose removal costs that loss least. This is BESA's learned
   allocation, a gradient of the block's loss for every row, under an exact budget;
3. with the mask fixed, tuning goes on, and the probe samples choose the best state.

4. On request (`model`) the kept weights of all blocks are tuned together at the end, under the model's own loss.

Targets come from the dense model, so that a block also makes up for the error of those before it. With N:M every row's
sparsity is fixed: SparseGPT's mask, and its kept weights are tuned.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from besa_exp.blocks.pruner import PrunedBlock, Task, Traits, pruned_by_masks
from besa_exp.methods.pruners.model_tuning import ModelTuning
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.methods.tuning import Ramp, Tuning, tune
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.statistics import Hessian


@dataclass(frozen=True)
class BesaReconstruct:
    """`start`: the share of the target that SparseGPT takes at once; `until`: the share of the steps after which the
    mask is fixed; `every`: steps between two changes of the mask. `dense_targets` off: targets are what the dense block
    makes of the pruned prefix, and what was lost before it stays lost. `model`: how the kept weights of all blocks are
    tuned after the last; None: they are not."""

    tuning: Tuning = field(default_factory=Tuning)
    start: float = 0.7
    until: float = 0.6
    every: int = 4
    group_size: int = 128
    damping: float = 0.01
    dense_targets: bool = True
    model: ModelTuning | None = None

    def __post_init__(self) -> None:
        SparseGPT(self.group_size, self.damping)  # which refuses what it cannot use
        for name in ("start", "until"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"pruner.{name}={getattr(self, name)}: must be in [0, 1]")
        if self.every < 1:
            raise ValueError(f"pruner.every={self.every}: must be at least 1")

    @property
    def traits(self) -> Traits:
        """What SparseGPT observes, the targets, and what follows the block loop."""
        return Traits(Hessian, dense_targets=self.dense_targets, refinements=(self.model,) if self.model else ())

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """What SparseGPT can do."""
        return SparseGPT(self.group_size, self.damping).check(sparsity, pattern)

    def prune_block(self, task: Task) -> PrunedBlock:
        """SparseGPT, then mask and weights together."""
        goal = task.goal
        ramp = None if goal.pattern else Ramp(self.start * goal.sparsity, goal.sparsity, self.until, self.every)
        first = goal if ramp is None else Goal(ramp.first)
        begun = SparseGPT(self.group_size, self.damping).masks_and_weights(replace(task, goal=first))
        tuned = tune(task.block, task.inputs, task.targets, begun[1], begun[0], self.tuning, task.on_step, ramp)
        masked = replace(pruned_by_masks(tuned.keep_masks), norms=tuned.norms)
        return replace(masked, weights=tuned.weights, loss_before=tuned.loss_before, steps=tuned.steps)
