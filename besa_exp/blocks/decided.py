"""A pruner whose masks, and weights where they moved, were decided before, for all blocks together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from besa_exp.blocks.pruner import PrunedBlock, Task, Traits, pruned_by_masks
from besa_exp.blocks.reports import BlockReport
from besa_exp.blocks.whole_model import Found


@dataclass(frozen=True)
class Decided:
    """`before`: the report of each block by the search that came first, whose course is reported again."""

    found: Sequence[Found]
    before: Sequence[BlockReport]

    traits = Traits(blind=True)

    def check(self, sparsity: float, pattern: str) -> list[str]:
        return []

    def prune_block(self, task: Task) -> PrunedBlock:
        block = task.block
        before, found = self.before[block.index], self.found[block.index]
        for step in before.steps:
            task.on_step(step)
        pruned = pruned_by_masks({name: mask.to(block.device) for name, mask in found.keep_masks().items()})
        weights = found.weights() if found.weights else None
        return replace(pruned, weights=weights, loss_before=before.loss_before, steps=before.steps)
