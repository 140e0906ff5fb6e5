"""No pruning. `pruner=dense` alone is only scored (`run_dense.py`); with an update or budget its blocks are walked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from besa_exp.blocks.pruner import PrunedBlock


@dataclass(frozen=True)
class Dense:
    """Keeps every weight."""

    statistic = None
    dense_targets = False

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Any target: it is not pruned towards."""
        return []

    def prune_block(self, block, inputs, targets, statistics, target, on_step) -> PrunedBlock:
        """Keep masks of ones."""
        weights = {name: linear.weight for name, linear in block.linears.items()}
        return PrunedBlock(
            keep_masks={name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()},
            allocated={name: torch.zeros(len(weight), device=weight.device) for name, weight in weights.items()},
        )
