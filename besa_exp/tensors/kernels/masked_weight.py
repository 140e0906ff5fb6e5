"""The weight under a hard mask that is never stored: W where rank >= pruned[row], zero elsewhere (BESA, Eq. 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from besa_exp.tensors.kernels.at_or_above import CHUNK, at_or_above


def masked_weight(
    weight: Float[Tensor, "out in"],
    rank: Int[Tensor, "out in"],
    pruned: Int[Tensor, " out"],
    out: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "out in"]:
    """`weight` with the `pruned[row]` least important weights of each row at zero; into `out` where given."""
    if out is None:
        return weight * at_or_above(rank, pruned)
    rows = max(1, CHUNK // weight.shape[1])
    parts = (values.split(rows) for values in (weight, rank, pruned, out))
    for w, r, bound, into in zip(*parts, strict=True):
        torch.mul(w, at_or_above(r, bound).to(w.dtype), out=into)  # a product that converts by itself is slower
    return out
