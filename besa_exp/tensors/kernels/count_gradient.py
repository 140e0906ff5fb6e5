"""The gradient of the loss with respect to how many weights a row gives up."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from besa_exp.tensors.kernels.masked_weight import CHUNK, at_or_above


def count_gradient(
    weight: Float[Tensor, "out in"],
    gradient: Float[Tensor, "out in"],
    rank: Int[Tensor, "out in"],
    pruned: Int[Tensor, " out"],
    window: float,
) -> Float[Tensor, " out"]:
    """dL / d(number of pruned weights) of each row, straight through the hard mask: pruning the weight at the cut moves
    the loss by -W dL/dW, averaged over the `window` ranks around the cut, where the next weights to go or to stay are.

    `gradient` is dL/dW of the masked weight; the result is fp32 whatever the weights are."""
    columns = weight.shape[1]
    first, end, width = _ranks_around(pruned, window, columns)
    rows = max(1, CHUNK // columns)
    parts = (part.split(rows) for part in (weight, gradient, rank, first, end))
    sums = [
        (w.float() * g.float()).mul_(_inside(r, low, high)).sum(dim=1)
        for w, g, r, low, high in zip(*parts, strict=True)
    ]
    return -torch.cat(sums) / width


def weights_around(
    weight: Float[Tensor, "out in"],
    rank: Int[Tensor, "out in"],
    pruned: Int[Tensor, " out"],
    window: float,
    levels: int,
    out: Float[Tensor, "out in"],
) -> Float[Tensor, " out"]:
    """Fill `out` with the weights in the window around pruned[row], of ranks below `levels`, and with zeros elsewhere.
    Returns the divisor that `count_gradient` uses for each row's sum. For a CPU: there is no kernel for a GPU."""
    first, end, width = _ranks_around(pruned, window, levels)
    rows = max(1, CHUNK // weight.shape[1])
    parts = (values.split(rows) for values in (weight, rank, first, end, out))
    for w, r, low, high, into in zip(*parts, strict=True):
        torch.mul(w, _inside(r, low, high).to(w.dtype), out=into)
    return width


def _inside(rank: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """1 where first[row] <= rank < end[row], else 0."""
    return at_or_above(rank, first).sub_(at_or_above(rank, end))


def _ranks_around(
    pruned: Int[Tensor, " out"], window: float, columns: int
) -> tuple[Int[Tensor, " out"], Int[Tensor, " out"], Float[Tensor, " out"]]:
    """The first of the `window` ranks around pruned[row], the first above them, and how wide the window is within the
    row. A window has one rank at least."""
    half = max(window / 2, 0.5)
    first, end = (pruned - half).ceil().clamp(min=0).long(), (pruned + half).ceil().clamp(max=columns).long()
    return first, end, (pruned + half).clamp(max=columns) - (pruned - half).clamp(min=0)
