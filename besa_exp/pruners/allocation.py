"""Allocation: how many weights each row of a block gives up, at a block budget that is met exactly.

A block's rows are those of all its linears in order. A cell is what shares one sparsity: a row, or a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from besa_exp import kernels
from besa_exp.masks import keep_by_rank, round_to_total


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


@dataclass(frozen=True)
class Rows:
    """The rows of all linears of a block: weights and ranks by linear; of each row its number of inputs, `columns`, and
    its `cell`."""

    weights: Mapping[str, Float[Tensor, "out in"]]
    ranks: Mapping[str, Int[Tensor, "out in"]]
    columns: Float[Tensor, " row"]
    cell: Int[Tensor, " row"]

    @staticmethod
    def of(weights: Mapping[str, Tensor], importance_of: Callable[[str], Tensor], granularity: str) -> Rows:
        """`granularity` row: every row is a cell; linear: every linear is one. Importances are made one at a time."""
        sizes = torch.tensor([len(weight) for weight in weights.values()])
        inputs = torch.tensor([weight.shape[1] for weight in weights.values()], dtype=torch.float64)
        columns = inputs.repeat_interleave(sizes)
        cell = torch.arange(len(columns)) if granularity == "row" else torch.arange(len(sizes)).repeat_interleave(sizes)
        device = next(iter(weights.values())).device
        ranks = {name: kernels.rank_in_row(importance_of(name)) for name in weights}
        return Rows(weights, ranks, columns.to(device), cell.to(device))

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
        """Integer numbers of weights to prune in each row, by linear; they sum to exactly `total`."""
        counts = round_to_total(self.columns * sparsity[self.cell], total)
        sizes = [len(weight) for weight in self.weights.values()]
        return dict(zip(self.weights, counts.split(sizes), strict=True))

    def keep_masks(self, counts: Mapping[str, Int[Tensor, " out"]]) -> dict[str, Bool[Tensor, "out in"]]:
        """Hard masks: rank >= count."""
        return {name: keep_by_rank(self.ranks[name], counts[name]) for name in self.weights}

    def masked_into(self, buffers: Mapping[str, Float[Tensor, "out in"]], counts: Mapping[str, Tensor]) -> None:
        """Fill `buffers` with the weights under the hard masks."""
        for name, weight in self.weights.items():
            kernels.masked_weight(weight, self.ranks[name], counts[name], out=buffers[name])

    def row_gradient(
        self,
        gradients: Mapping[str, Float[Tensor, "out in"]],
        counts: Mapping[str, Int[Tensor, " out"]],
        window: float,
    ) -> Float[Tensor, " row"]:
        """dL / d(sparsity of a row). `gradients` are dL/dW of the masked weights, `window` a fraction of a row."""
        by_count = [
            kernels.count_gradient(W, gradients[name], self.ranks[name], counts[name], window * W.shape[1])
            for name, W in self.weights.items()
        ]
        return self.columns * torch.cat(by_count).double()
