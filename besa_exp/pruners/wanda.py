"""Wanda (Sun et al., arXiv 2306.11695): importance |W| ||X||, the same sparsity in every row, no update."""

from __future__ import annotations

from dataclasses import dataclass

from besa_exp.importance import wanda_importance
from besa_exp.masks import keep_per_row
from besa_exp.pattern import check_unchosen
from besa_exp.pruning import PrunedBlock, pruned_by_masks
from besa_exp.statistics import InputNorm


@dataclass(frozen=True)
class Wanda:
    """Prunes the floor(sparsity * in) least important weights of every row, or N:M."""

    statistic = InputNorm
    dense_targets = False

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Any sparsity, any N:M whose N is said."""
        return check_unchosen(pattern, "wanda")

    def prune_block(self, block, inputs, targets, statistics, target, on_step) -> PrunedBlock:
        """Each row by itself."""
        return pruned_by_masks(
            {
                name: keep_per_row(wanda_importance(linear.weight.detach(), statistics[name].squared_norm), target)
                for name, linear in block.linears.items()
            }
        )
