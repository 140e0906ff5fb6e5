"""BESA with weights that move: the sparsity of every row is learned, then the kept weights are tuned, block by block.

BESA (Xu et al., arXiv 2402.16880) learns how much each row gives up while the weights stay as they are. Here the kept
weights then make up for what went:

1. `besa` learns the sparsity of every row, and prunes the block to the share `start` of the target: all of it, unless
   said otherwise;
2. the kept weights are tuned under the block's reconstruction loss (`besa_exp.methods.tuning`), and the probe samples
   choose the best state;
3. a rest that `start` left goes while they are tuned: every few steps the weights of the whole block whose removal
   costs that loss least. That is an allocation learned along with the weights, under an exact budget;
4. on request (`model`) the kept weights of all blocks are tuned together at the end, under the model's own loss.

`begin=sparsegpt` takes SparseGPT's mask and weights (arXiv 2301.00774) in the place of `besa`'s mask. Small models gain
from that with `start=0.7` and many epochs; a real one at 50 % loses (`experiments/real_model`).

Targets come from the dense model, so that a block also makes up for the error of those before it. With N:M every row's
sparsity is fixed: SparseGPT's mask, and its kept weights are tuned.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from besa_exp.blocks.pruner import PrunedBlock, Task, Traits, pruned_by_masks
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.model_tuning import ModelTuning
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.methods.tuning import Ramp, Tuning, Weights, tune
from besa_exp.rules import Count, Positive, check_fields, one_of, within
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.statistics import Hessian, InputNorm


@dataclass(frozen=True)
class BesaReconstruct:
    """`begin`: besa or sparsegpt, which takes the share `start` of the target at once; `until`: the share of the steps
    after which the mask is fixed; `every`: steps between two changes of the mask. `dense_targets` off: targets are
    what the dense block makes of the pruned prefix, and what was lost before it stays lost. `model`: how the kept
    weights of all blocks are tuned after the last; None: they are not."""

    tuning: Tuning = field(default_factory=Tuning)
    begin: Annotated[str, one_of("besa", "sparsegpt")] = "besa"
    start: Annotated[float, within(least=0, most=1)] = 1.0
    until: Annotated[float, within(least=0, most=1)] = 0.6
    every: Count = 4
    group_size: Count = 128
    damping: Positive = 0.01
    dense_targets: bool = True
    model: ModelTuning | None = None

    def __post_init__(self) -> None:
        check_fields(self, "pruner")
        if self.model and self.tuning.norms:
            raise ValueError(
                "pruner.tuning.norms=true: the steps under the model's loss begin with the dense norms again; leave it "
                "at false, or take pruner=besa_reconstruct, which has no such steps"
            )

    @property
    def traits(self) -> Traits:
        """What `besa` observes, or SparseGPT; the targets, and what follows the block loop."""
        return Traits(
            InputNorm if self.begin == "besa" else Hessian,
            dense_targets=self.dense_targets,
            refinements=(self.model,) if self.model else (),
            under_pattern=Hessian,
        )

    def check(self, sparsity: float, pattern: str) -> list[str]:
        return SparseGPT(self.group_size, self.damping).check(sparsity, pattern)

    def prune_block(self, task: Task) -> PrunedBlock:
        """The first share of the zeros, then mask and weights together."""
        goal = task.goal
        ramped = self.start < 1 and not goal.pattern
        ramp = Ramp(self.start * goal.sparsity, goal.sparsity, self.until, self.every) if ramped else None
        begun, weights = self._begun(replace(task, goal=goal if ramp is None else Goal(ramp.first)))
        task.forget()
        done = len(begun.steps)
        on_step = task.after(done).on_step
        found = tune(task.block, task.inputs, task.targets, weights, begun.keep_masks, self.tuning, on_step, ramp)
        return replace(found, steps=(*begun.steps, *found.after(done).steps))

    def _begun(self, task: Task) -> tuple[PrunedBlock, Weights]:
        if self.begin == "besa" and not task.goal.pattern:
            besa = Besa(seed=self.tuning.seed).prune_block(task)
            return besa, task.weights
        masks, weights = SparseGPT(self.group_size, self.damping).masks_and_weights(task)
        return pruned_by_masks(masks), weights
