"""Wanda (Sun et al., arXiv 2306.11695): importance |W| ||X||, the same sparsity in every row, no update."""

from __future__ import annotations

from dataclasses import dataclass

from besa_exp.blocks.pruner import PrunedBlock, pruned_by_masks
from besa_exp.tensors.importance import wanda_importance
from besa_exp.tensors.masks import keep_per_row, targets_of_linears
from besa_exp.tensors.pattern import check_unchosen
from besa_exp.tensors.statistics import InputNorm


@dataclass(frozen=True)
class Wanda:
    """Prunes the floor(sparsity * in) least important weights of every row, or N:M; under a budget over depth as
    many as this gives the block."""

    statistic = InputNorm
    dense_targets = False

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Any sparsity, any N:M whose N is said."""
        return check_unchosen(pattern, "wanda")

    def prune_block(self, block, inputs, targets, statistics, target, on_step) -> PrunedBlock:
        """Each row by itself."""
        weights = {name: linear.weight.detach() for name, linear in block.linears.items()}
        targets = targets_of_linears({name: weight.numel() for name, weight in weights.items()}, target)
        return pruned_by_masks(
            {
                name: keep_per_row(wanda_importance(weight, statistics[name].squared_norm), targets[name])
                for name, weight in weights.items()
            }
        )
