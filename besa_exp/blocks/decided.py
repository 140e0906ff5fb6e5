"""A pruner whose masks, and weights where they moved, were decided before, for all blocks together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from besa_exp.blocks.pruner import PrunedBlock, Task, Traits, pruned_by_masks
from besa_exp.blocks.reports import BlockReport
from besa_exp.blocks.whole_model import KeepMasks, Weights


@dataclass(frozen=True)
class Decided:
    """`before`: the report of each block by the search that came first, whose course is reported again."""

    keep_masks: Sequence[KeepMasks]
    weights: Sequence[Weights] | None
    before: Sequence[BlockReport]

    traits = Traits()

    def check(self, sparsity: float, pattern: str) -> list[str]:
        return []

    def prune_block(self, task: Task) -> PrunedBlock:
        block = task.block
        before = self.before[block.index]
        for step in before.steps:
            task.on_step(step)
        pruned = pruned_by_masks({name: mask.to(block.device) for name, mask in self.keep_masks[block.index].items()})
        weights = self.weights[block.index] if self.weights else None
        return replace(pruned, weights=weights, loss_before=before.loss_before, steps=before.steps)
