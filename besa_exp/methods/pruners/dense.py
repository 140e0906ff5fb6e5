"""No pruning. `pruner=dense` alone is only scored (`besa_exp.runs.dense`); with an update or budget its blocks are
walked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from besa_exp.blocks.pruner import PrunedBlock, Task, Traits, pruned_by_masks


@dataclass(frozen=True)
class Dense:
    """Keeps every weight."""

    traits = Traits(blind=True)

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Any goal: it is not pruned towards."""
        return []

    def prune_block(self, task: Task) -> PrunedBlock:
        return pruned_by_masks({name: torch.ones_like(W, dtype=torch.bool) for name, W in task.weights.items()})
