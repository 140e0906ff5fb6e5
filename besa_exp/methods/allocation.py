"""Allocation: how many weights each row of a block gives up, at a block budget that is met exactly.

A block's rows are those of all its linears in order. A cell is what shares one sparsity: a row, or a linear. A row
gives up levels: its least important weights, one a level; or, where every row keeps an N of its own of every M inputs
(pattern=N:M), the least important weight of each of its groups of M, so that a level is worth in / M weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from besa_exp.tensors import kernels
from besa_exp.tensors.masks import keep_by_rank, rank_in_group, round_to_total


def project_to_budget(
    sparsity: Float[Tensor, " cell"], capacity: Float[Tensor, " cell"], total: int
) -> Float[Tensor, " cell"]:
    """clip(sparsity - shift, 0, 1) with the shift at which sum(capacity * sparsity) = total: the nearest allocation
    that meets the budget, cells weighted by their `capacity` in weights.

    The sum falls with the shift in straight pieces that begin where a cell leaves 1 (shift = sparsity - 1) and end
    where it reaches 0 (shift = sparsity); so sorting these places finds the piece, and the piece the shift."""
    places, order = torch.cat([sparsity - 1, sparsity]).sort()
    slopes = torch.cat([-capacity, capacity])[order].cumsum(dim=0)  # of the piece that begins at each place
    falls = (slopes[:-1] * places.diff()).cumsum(dim=0)
    sums = capacity.sum() + torch.cat([falls.new_zeros(1), falls])
    piece = (sums > total).sum().clamp(1, len(sums)) - 1  # the last place at which too many are pruned, or the first
    slope = slopes[piece]
    shift = places[piece] + torch.where(slope < 0, (total - sums[piece]) / slope, 0.0)
    return (sparsity - shift).clamp(0, 1)


def round_to_worth(
    counts: Float[Tensor, " row"], levels: Int[Tensor, " row"], worth: Int[Tensor, " row"], total: int
) -> Int[Tensor, " row"]:
    """Integers in [0, levels] next to `counts` with sum(worth * integers) = total, or the nearest number that whole
    levels reach: what they sum to are the multiples of the greatest common divisor of the worths.

    Rows of equal worth share a whole number of levels. The most valuable first take the number next to theirs that
    leaves a rest which the others can make up exactly; within them the largest remainders are rounded up."""
    kinds = sorted(set(worth.tolist()), reverse=True)
    divisor = math.gcd(*kinds)
    rest = divisor * round(total / divisor)
    rounded = torch.zeros_like(levels)
    for place, value in enumerate(kinds):
        of_kind = worth == value
        others = math.gcd(*kinds[place + 1 :])  # of none: 0
        most = int(levels[of_kind].sum())
        wish = rest / value if not others else float(counts[of_kind].sum())
        near = sorted(
            range(max(0, math.floor(wish) - others), min(most, math.ceil(wish) + others) + 1),
            key=lambda n: abs(n - wish),
        )
        fits = (n for n in near if others and (rest - n * value) % others == 0)
        share = next(fits, min(max(round(wish), 0), most))
        capacity = levels[of_kind].double()
        rounded[of_kind] = round_to_total(
            capacity * project_to_budget(counts[of_kind] / capacity, capacity, share), share
        )
        rest -= share * value
    return rounded


@dataclass(frozen=True)
class Rows:
    """The rows of all linears of a block: weights and ranks by linear; of each row its number of inputs, `columns`, and
    its `cell`. `group`: ranks are within so many consecutive inputs; None: within the row."""

    weights: Mapping[str, Float[Tensor, "out in"]]
    ranks: Mapping[str, Int[Tensor, "out in"]]
    columns: Float[Tensor, " row"]
    cell: Int[Tensor, " row"]
    group: int | None = None

    @staticmethod
    def of(
        weights: Mapping[str, Tensor],
        importance_of: Callable[[str], Tensor],
        granularity: str,
        group: int | None = None,
    ) -> Rows:
        """`granularity` row: every row is a cell; linear: every linear is one. Importances are made one at a time."""
        sizes = torch.tensor([len(weight) for weight in weights.values()])
        inputs = torch.tensor([weight.shape[1] for weight in weights.values()], dtype=torch.float64)
        columns = inputs.repeat_interleave(sizes)
        cell = torch.arange(len(columns)) if granularity == "row" else torch.arange(len(sizes)).repeat_interleave(sizes)
        device = next(iter(weights.values())).device
        rank = kernels.rank_in_row if group is None else partial(rank_in_group, group=group)
        ranks = {name: rank(importance_of(name)) for name in weights}
        return Rows(weights, ranks, columns.to(device), cell.to(device), group)

    @property
    def num_weights(self) -> int:
        """Weights of the block's linears."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def num_cells(self) -> int:
        """Rows or linears, as the granularity is."""
        return int(self.cell[-1]) + 1

    def per_cell(self, values: Float[Tensor, " row"], num_cells: int) -> Float[Tensor, " cell"]:
        """Sums over the rows of each cell."""
        return values.new_zeros(num_cells).index_add_(0, self.cell, values)

    def counts(self, sparsity: Float[Tensor, " cell"], total: int) -> dict[str, Int[Tensor, " out"]]:
        """Integer numbers of levels to prune in each row, by linear; they sum to exactly `total` weights, or with
        groups to the nearest number that can be reached."""
        if self.group is None:
            counts = round_to_total(self.columns * sparsity[self.cell], total)
        else:
            levels = torch.full_like(self.cell, self.group)
            counts = round_to_worth(levels * sparsity[self.cell], levels, self.columns.long() // self.group, total)
        sizes = [len(weight) for weight in self.weights.values()]
        return dict(zip(self.weights, counts.split(sizes), strict=True))

    def sparsity(self, counts: Mapping[str, Int[Tensor, " out"]]) -> dict[str, Float[Tensor, " out"]]:
        """The sparsity of each row, by linear."""
        return {name: count / self._levels(name) for name, count in counts.items()}

    def keep_masks(self, counts: Mapping[str, Int[Tensor, " out"]]) -> dict[str, Bool[Tensor, "out in"]]:
        """Hard masks: rank >= count."""
        return {name: keep_by_rank(self.ranks[name], counts[name]) for name in self.weights}

    def masked_into(self, buffers: Mapping[str, Float[Tensor, "out in"]], counts: Mapping[str, Tensor]) -> None:
        """Fill `buffers` with the weights under the hard masks."""
        for name, weight in self.weights.items():
            kernels.masked_weight(weight, self.ranks[name], counts[name], out=buffers[name])

    def count_gradient(
        self, name: str, gradient: Float[Tensor, "out in"], pruned: Int[Tensor, " out"], window: float
    ) -> Float[Tensor, " out"]:
        """dL / d(levels pruned) of each row of a linear; that of groups is their sum. `gradient`: dL/dW of the masked
        weights; `window`: a fraction of the levels."""
        weight, rank, levels = self.weights[name], self.ranks[name], self._levels(name)
        groups = weight.shape[1] // levels
        weight, gradient, rank = (values.reshape(-1, levels) for values in (weight, gradient, rank))
        pruned = pruned.repeat_interleave(groups)
        by_group = kernels.count_gradient(weight, gradient, rank, pruned, self._window(name, window))
        return by_group.view(-1, groups).sum(dim=1)

    def weights_around(
        self, name: str, pruned: Int[Tensor, " out"], window: float, out: Float[Tensor, "out in"]
    ) -> Float[Tensor, " out"]:
        """Fill `out` with the weights around the cuts that `count_gradient` averages over, all others at zero. Returns
        what their sum in a row is to be divided by."""
        window, levels = self._window(name, window), self._levels(name)
        return kernels.weights_around(self.weights[name], self.ranks[name], pruned, window, levels, out)

    def _levels(self, name: str) -> int:
        return self.group or self.weights[name].shape[1]

    def _window(self, name: str, window: float) -> float:
        """In levels: of a group the weights on both sides of the cut at least."""
        return max(window * self._levels(name), 2.0 if self.group else 0.0)

    def row_gradient(self, by_count: Mapping[str, Float[Tensor, " out"]]) -> Float[Tensor, " row"]:
        """dL / d(sparsity of a row), from the linears' `count_gradient` in order."""
        levels = self.columns if self.group is None else self.group
        return levels * torch.cat(list(by_count.values())).double()
