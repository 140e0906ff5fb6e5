"""RIA (Zhang et al., ICLR 2024): relative importance and activations, the same sparsity in every row, no update.

    (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) ||X_j||^a,    a = 0.5.

A weight counts by its share of its row and of its column, so that no channel is pruned away. `permute` chooses which
inputs make up the groups of N:M (permutation.py). The weights keep their own order, so that the model loads as any
other; the order in which the masks are N:M is kept beside them, and whoever runs N:M products gathers the inputs by it.
Linears that are given the same inputs share one order, so that one gather serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from besa_exp.blocks.pruner import PrunedBlock, pruned_by_masks
from besa_exp.tensors.importance import ria_importance
from besa_exp.tensors.masks import keep_per_row, targets_of_linears
from besa_exp.tensors.pattern import check_unchosen, fixes_sparsity
from besa_exp.tensors.permutation import keep_n_of_m_permuted, permuted_for
from besa_exp.tensors.statistics import InputNorm, WithNorm, by_shared_input


@dataclass(frozen=True)
class Ria:
    """`power` is the paper's a; `permute`: choose the groups of N:M."""

    power: float = 0.5
    permute: bool = False

    statistic = InputNorm
    dense_targets = False

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Any sparsity, any N:M; there must be groups where they are to be chosen."""
        if self.permute and not fixes_sparsity(pattern):
            return [f"pruner.permute=true: pattern={pattern} has no groups of N:M to choose; use pattern=2:4, or false"]
        return check_unchosen(pattern, "ria")

    def prune_block(self, block, inputs, targets, statistics, target, on_step) -> PrunedBlock:
        """Each row by itself."""
        scores = {
            name: ria_importance(linear.weight.detach(), statistics[name].squared_norm, self.power)
            for name, linear in block.linears.items()
        }
        if not self.permute:
            targets = targets_of_linears({name: score.numel() for name, score in scores.items()}, target)
            return pruned_by_masks({name: keep_per_row(score, targets[name]) for name, score in scores.items()})
        orders = _orders(scores, statistics, *target.pattern)
        masks = {name: keep_n_of_m_permuted(score, orders[name], *target.pattern) for name, score in scores.items()}
        return replace(pruned_by_masks(masks), permutations=orders)


def _orders(
    scores: Mapping[str, Tensor], statistics: Mapping[str, WithNorm], kept: int, group: int
) -> dict[str, Tensor]:
    """The order of each linear's inputs: one for all that are given the same inputs."""
    orders = {}
    for _, names in by_shared_input(statistics):
        order = permuted_for(torch.cat([scores[name] for name in names]), kept, group)
        orders |= dict.fromkeys(names, order)
    return orders
