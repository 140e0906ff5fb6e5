"""Allocation: how much each row of a block gives up, at a total that is met exactly.

A block's rows are those of all its linears in order. A cell is what shares one sparsity s: a row, or a linear. A cell
of n weights gives up n s of them, and

    sum over cells of n s = total

is a plane. `project_to_budget` returns to it, `Rows.counts` rounds to whole numbers on it, `along_budget` gives a
gradient's part along it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from besa_exp.blocks.linears import in_one_piece
from besa_exp.tensors import kernels
from besa_exp.tensors.masks import keep_by_rank, round_to_total

WAYS, ROUNDS = 32, 8  # of the search for a shift


def project_to_budget(
    sparsity: Float[Tensor, " cell"], capacity: Float[Tensor, " cell"], total: int | Int[Tensor, ""]
) -> Float[Tensor, " cell"]:
    """clip(sparsity - shift, 0, 1) with the shift at which sum(capacity * sparsity) = total: the nearest allocation
    that meets the budget, cells weighted by their `capacity` in weights."""
    shift = _shift if sparsity.device.type == "cpu" else shift_by_narrowing
    return (sparsity - shift(sparsity, capacity, total)).clamp(0, 1)


def _shift(
    sparsity: Float[Tensor, " cell"], capacity: Float[Tensor, " cell"], total: int | Int[Tensor, ""]
) -> Float[Tensor, ""]:
    """The sum falls with the shift in straight pieces that begin where a cell leaves 1 (shift = sparsity - 1) and end
    where it reaches 0 (shift = sparsity); so sorting these places finds the piece, and the piece the shift."""
    places, order = torch.cat([sparsity - 1, sparsity]).sort()
    slopes = torch.cat([-capacity, capacity])[order].cumsum(dim=0)  # of the piece that begins at each place
    falls = (slopes[:-1] * places.diff()).cumsum(dim=0)
    sums = capacity.sum() + torch.cat([falls.new_zeros(1), falls])
    piece = (sums > total).sum().clamp(1, len(sums)) - 1  # the last place at which too many are pruned, or the first
    slope = slopes[piece]
    return places[piece] + torch.where(slope < 0, (total - sums[piece]) / slope, 0.0)


def shift_by_narrowing(
    sparsity: Float[Tensor, " cell"], capacity: Float[Tensor, " cell"], total: int | Int[Tensor, ""]
) -> Float[Tensor, ""]:
    """The same shift for a GPU, where sums of floats have no deterministic form that runs along, and reading an index
    waits for all that was computed. Each of ROUNDS divides the interval that holds the shift by WAYS: the last, 1e-12
    of the first, lies in one piece, which gives the shift."""
    low, width = sparsity.min() - 1, sparsity.max() - sparsity.min() + 1
    places = width * torch.arange(1, WAYS, dtype=sparsity.dtype, device=sparsity.device)[:, None]
    for number in range(1, ROUNDS + 1):
        left = (sparsity - torch.add(low, places, alpha=WAYS**-number)).clamp_(0, 1)
        low = torch.add(low, width * ((left * capacity).sum(dim=1) > total).sum(), alpha=WAYS**-number)
    width = width * WAYS**-ROUNDS
    left = sparsity - (low + width / 2)
    between = torch.where((left > 0) & (left < 1), capacity, 0.0)
    unshifted = torch.where(left < 1, between * sparsity, capacity).sum()
    slope = between.sum()
    return torch.where(slope > 0, (unshifted - total) / slope, low).clamp(low, low + width)


def along_budget(gradient: Float[Tensor, " cell"], capacity: Float[Tensor, " cell"]) -> Float[Tensor, " cell"]:
    """The gradient to the sparsities without the part that would only change the total."""
    return gradient - capacity * (gradient.sum() / capacity.sum())


@dataclass(frozen=True)
class Rows:
    """The rows of all linears of a block: weights and ranks by linear; of each row the number of its weights,
    `columns`, and its `cell`; of each cell the number of its weights, `capacity`. A row gives up levels: a level is the
    weights of one rank, a single one of the row, unless ranks are those within groups of `group` inputs
    (`besa_exp.methods.n_of_m`).

    `rounded`: counts of levels to whole numbers at a total number of weights. `narrowest`: levels that a window around
    the cut holds at least."""

    weights: Mapping[str, Float[Tensor, "_out _in"]]
    ranks: Mapping[str, Int[Tensor, "_out _in"]]
    columns: Float[Tensor, " row"]
    cell: Int[Tensor, " row"]
    capacity: Float[Tensor, " cell"]
    group: int | None = None
    rounded: Callable[[Tensor, int], Tensor] = round_to_total
    narrowest: float = 0.0

    @property
    def levels(self) -> Float[Tensor, " row"]:
        return torch.full_like(self.columns, self.group) if self.group else self.columns

    @staticmethod
    def of(
        weights: Mapping[str, Tensor],
        importance_of: Callable[[str], Tensor],
        granularity: str,
        rank: Callable[[Tensor], Tensor] = kernels.rank_in_row,
    ) -> Rows:
        """`granularity` row: every row is a cell; linear: every linear is one. Importances are made one at a time."""
        sizes = torch.tensor([len(weight) for weight in weights.values()])
        inputs = torch.tensor([weight.shape[1] for weight in weights.values()], dtype=torch.float64)
        columns = inputs.repeat_interleave(sizes)
        cell = torch.arange(len(columns)) if granularity == "row" else torch.arange(len(sizes)).repeat_interleave(sizes)
        device = next(iter(weights.values())).device
        ranks = {name: rank(importance_of(name)) for name in weights}
        for names in in_one_piece(weights):
            if len(names) > 1:  # as their weights lie
                ranks |= zip(names, torch.stack([ranks.pop(name) for name in names]), strict=True)
        capacity = columns.new_zeros(int(cell[-1]) + 1).index_add_(0, cell, columns)
        return Rows(weights, ranks, columns.to(device), cell.to(device), capacity.to(device))

    @property
    def num_weights(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())

    def num_levels(self, name: str) -> int:
        return self.group or self.weights[name].shape[1]

    def per_cell(self, values: Float[Tensor, " row"]) -> Float[Tensor, " cell"]:
        """Sums over the rows of each cell."""
        if len(values) == len(self.capacity):  # every row is a cell; a GPU would sort their numbers for the sum
            return values
        return values.new_zeros(len(self.capacity)).index_add_(0, self.cell, values)

    def by_linear(self, values: Tensor) -> dict[str, Tensor]:
        """Values of all rows [row], split into those of each linear [out]."""
        sizes = [len(weight) for weight in self.weights.values()]
        return dict(zip(self.weights, values.split(sizes), strict=True))

    def counts(self, sparsity: Float[Tensor, " cell"], total: int) -> dict[str, Int[Tensor, " out"]]:
        """Whole numbers of levels to prune in each row, by linear; in weights they sum to exactly `total`."""
        return self.by_linear(self.rounded(self.levels * sparsity[self.cell], total))

    def sparsity(self, counts: Mapping[str, Int[Tensor, " _out"]]) -> dict[str, Float[Tensor, " _out"]]:
        return {name: count / self.num_levels(name) for name, count in counts.items()}

    def keep_masks(self, counts: Mapping[str, Int[Tensor, " _out"]]) -> dict[str, Bool[Tensor, "_out _in"]]:
        """Hard masks: rank >= count."""
        return {name: keep_by_rank(self.ranks[name], counts[name]) for name in self.weights}
