"""The gradient of the loss with respect to how many weights a row gives up."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from besa_exp.kernels.at_or_above import at_or_above

CHUNK = 1 << 20  # weights a pass: the temporaries stay in a CPU's cache, whatever the size of the linear


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
    half = max(window / 2, 0.5)
    first, end = (pruned - half).ceil().clamp(min=0).long(), (pruned + half).ceil().clamp(max=columns).long()
    rows = max(1, CHUNK // columns)
    parts = (part.split(rows) for part in (weight, gradient, rank, first, end))
    sums = [
        (w.float() * g.float()).mul_(at_or_above(r, low).sub_(at_or_above(r, high))).sum(dim=1)
        for w, g, r, low, high in zip(*parts, strict=True)
    ]
    return -torch.cat(sums) / ((pruned + half).clamp(max=columns) - (pruned - half).clamp(min=0))
