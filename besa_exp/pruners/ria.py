"""RIA (Zhang et al., ICLR 2024): relative importance and activations, the same sparsity in every row, no update.

    (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) ||X_j||^a,    a = 0.5.

A weight counts by its share of its row and of its column, so that no channel is pruned away. The paper's permutation of
channels for N:M is not built: the saved model would need it in the layers before.
"""

from __future__ import annotations

from dataclasses import dataclass

from besa_exp.importance import ria_importance
from besa_exp.masks import keep_per_row
from besa_exp.pruning import PrunedBlock, pruned_by_masks
from besa_exp.statistics import InputNorm


@dataclass(frozen=True)
class Ria:
    """`power` is the paper's a."""

    power: float = 0.5

    statistic = InputNorm
    dense_targets = False

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Any sparsity, any N:M."""
        return []

    def prune_block(self, block, inputs, targets, statistics, target, on_step) -> PrunedBlock:
        """Each row by itself."""
        scores = {
            name: ria_importance(linear.weight.detach(), statistics[name].squared_norm, self.power)
            for name, linear in block.linears.items()
        }
        return pruned_by_masks({name: keep_per_row(score, target) for name, score in scores.items()})
