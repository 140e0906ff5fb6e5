"""Magnitude pruning: |W|, the same sparsity in every linear, no data, no update (Han et al., arXiv 1506.02626)."""

from __future__ import annotations

from dataclasses import dataclass

from besa_exp.blocks.pruner import PrunedBlock, pruned_by_masks
from besa_exp.tensors.importance import magnitude_importance
from besa_exp.tensors.masks import keep_largest, keep_n_of_m, targets_of_linears
from besa_exp.tensors.pattern import check_unchosen


@dataclass(frozen=True)
class Magnitude:
    """Prunes the round(sparsity * weights) smallest weights of each linear, or N:M."""

    statistic = None
    dense_targets = False

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Any sparsity, any N:M whose N is said."""
        return check_unchosen(pattern, "magnitude")

    def prune_block(self, block, inputs, targets, statistics, target, on_step) -> PrunedBlock:
        """Each linear by itself."""
        sizes = {name: linear.weight.numel() for name, linear in block.linears.items()}
        targets, keep_masks = targets_of_linears(sizes, target), {}
        for name, linear in block.linears.items():
            importance = magnitude_importance(linear.weight.detach())
            if target.pattern:
                keep_masks[name] = keep_n_of_m(importance, *target.pattern)
            else:
                keep_masks[name] = keep_largest(importance, round(targets[name].sparsity * importance.numel()))
        return pruned_by_masks(keep_masks)
