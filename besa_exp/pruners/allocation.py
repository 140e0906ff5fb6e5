"""Allocation: how many weights each row of a block gives up, at a block budget that is met exactly.

A block's rows are those of all its linears in order. A cell is what shares one sparsity: a row, or a linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from besa_exp import kernels
from besa_exp.masks import keep_by_rank, round_to_total


def project_to_budget(
    sparsity: Float[Tensor, " cell"], capacity: Float[Tensor, " cell"], total: int
) -> Float[Tensor, " cell"]:
    """clip(sparsity - shift, 0, 1) with the shift at which sum(capacity * sparsity) = total, found by bisection: the
    nearest allocation that meets the budget, cells weighted by their `capacity` in weights."""
    low, high = sparsity.min() - 1, sparsity.max()
    for _ in range(60):  # halves an interval of length at most 2 below the rounding of fp64
        middle = (low + high) / 2
        too_many = (capacity * (sparsity - middle).clamp(0, 1)).sum() > total
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return (sparsity - high).clamp(0, 1)


@dataclass(frozen=True)
class Rows:
    """The rows of all linears of a block: weights and ranks by linear; of each row its number of inputs, `columns`, and
    its `cell`."""

    weights: Mapping[str, Float[Tensor, "out in"]]
    ranks: Mapping[str, Int[Tensor, "out in"]]
    columns: Float[Tensor, " row"]
    cell: Int[Tensor, " row"]

    @staticmethod
    def of(weights: Mapping[str, Tensor], importances: Mapping[str, Tensor], granularity: str) -> Rows:
        """`granularity` row: every row is a cell; linear: every linear is one."""
        sizes = torch.tensor([len(weight) for weight in weights.values()])
        inputs = torch.tensor([weight.shape[1] for weight in weights.values()], dtype=torch.float64)
        columns = inputs.repeat_interleave(sizes)
        cell = torch.arange(len(columns)) if granularity == "row" else torch.arange(len(sizes)).repeat_interleave(sizes)
        device = next(iter(weights.values())).device
        ranks = {name: kernels.rank_in_row(importance) for name, importance in importances.items()}
        return Rows(weights, ranks, columns.to(device), cell.to(device))

    @property
    def num_weights(self) -> int:
        """Weights of the block's linears."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def capacity(self) -> Float[Tensor, " cell"]:
        """Weights of each cell."""
        return self.per_cell(self.columns)

    def per_cell(self, values: Float[Tensor, " row"]) -> Float[Tensor, " cell"]:
        """Sums over the rows of each cell."""
        return values.new_zeros(int(self.cell[-1]) + 1).index_add_(0, self.cell, values)

    def counts(self, sparsity: Float[Tensor, " cell"], total: int) -> dict[str, Int[Tensor, " out"]]:
        """Integer numbers of weights to prune in each row, by linear; they sum to exactly `total`."""
        counts = round_to_total(self.columns * sparsity[self.cell], total)
        sizes = [len(weight) for weight in self.weights.values()]
        return dict(zip(self.weights, counts.split(sizes), strict=True))

    def keep_masks(self, counts: Mapping[str, Int[Tensor, " out"]]) -> dict[str, Bool[Tensor, "out in"]]:
        """Hard masks: rank >= count."""
        return {name: keep_by_rank(self.ranks[name], counts[name]) for name in self.weights}

    def masked(self, counts: Mapping[str, Int[Tensor, " out"]]) -> dict[str, Float[Tensor, "out in"]]:
        """The weights under the hard masks."""
        return {name: self.weights[name] * mask for name, mask in self.keep_masks(counts).items()}

    def sparsity_gradient(
        self,
        gradients: Mapping[str, Float[Tensor, "out in"]],
        counts: Mapping[str, Int[Tensor, " out"]],
        window: float,
    ) -> Float[Tensor, " cell"]:
        """dL / d(sparsity of a cell) along the budget: the part that would only change the total is taken out.

        `gradients` are dL/dW of the masked weights, `window` a fraction of a row."""
        by_row = torch.cat(
            [
                kernels.count_gradient(
                    weight, gradients[name], self.ranks[name], counts[name], window * weight.shape[1]
                )
                for name, weight in self.weights.items()
            ]
        )
        by_cell = self.per_cell(self.columns * by_row.double())
        capacity = self.capacity
        return by_cell - capacity * (by_cell.sum() / capacity.sum())
