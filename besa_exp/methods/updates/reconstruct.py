"""Reconstruction as an update: the kept weights of any mask, tuned under the block's loss (besa_exp.methods.tuning)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from besa_exp.blocks.pruner import PrunedBlock, Task, Traits
from besa_exp.methods.tuning import Tuning, tune


@dataclass(frozen=True)
class Reconstruct:
    """Begins with the pruner's weights, or the dense ones where it updates none."""

    tuning: Tuning = field(default_factory=Tuning)

    traits = Traits(dense_targets=True)  # so that a block also makes up for the error of those before it

    def check(self, pattern: str) -> list[str]:
        return []

    def update_block(self, task: Task, pruned: PrunedBlock) -> PrunedBlock:
        task.forget()
        begun = task.weights if pruned.weights is None else pruned.weights
        tuned = tune(task.block, task.inputs, task.targets, begun, pruned.keep_masks, self.tuning, task.on_step)
        found = replace(pruned, weights=tuned.weights, norms=tuned.norms)
        return replace(found, loss_before=tuned.loss_before, steps=tuned.steps)
