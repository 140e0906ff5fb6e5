"""The weight under a hard mask that is never stored: W where rank >= pruned[row], zero elsewhere (BESA, Eq. 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from besa_exp.kernels.at_or_above import CHUNK, at_or_above


def masked_weight(
    weight: Float[Tensor, "out in"],
    rank: Int[Tensor, "out in"],
    pruned: Int[Tensor, " out"],
    out: Float[Tensor, "out in"] | None = None,
    end: Int[Tensor, " out"] | None = None,
) -> Float[Tensor, "out in"]:
    """`weight` with the `pruned[row]` least important weights of each row at zero, and where `end` (at least `pruned`)
    is given those of rank end[row] and above too; into `out` where given."""
    if out is None:
        return weight * _kept(rank, pruned, end)
    rows = max(1, CHUNK // weight.shape[1])
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        kept = _kept(rank[part], pruned[part], end if end is None else end[part])
        torch.mul(weight[part], kept.to(weight.dtype), out=out[part])  # a product that converts by itself is slower
    return out


def _kept(rank: Tensor, pruned: Tensor, end: Tensor | None) -> Tensor:
    kept = at_or_above(rank, pruned)
    return kept if end is None else kept.sub_(at_or_above(rank, end))
