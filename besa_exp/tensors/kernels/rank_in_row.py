"""Positions of weights in their rows by importance."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from besa_exp.tensors.kernels.numpy_rows import sort_rows_

CHUNK = 1 << 22  # weights that are sorted at a time: their keys take 8 bytes each


def rank_in_row(importance: Float[Tensor, "out in"]) -> Int[Tensor, "out in"]:
    """Position of each weight in its row by importance (fp32 or narrower), 0 = least; ties by position. 2 bytes a
    weight up to 32,767 inputs, 4 beyond.

    The sorted numbers are integers with the importance in the upper half and the position in the lower half. They have
    no ties, so a sort without indices, which need not be stable, is enough."""
    columns = importance.shape[1]
    dtype = torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32
    rank = torch.empty(importance.shape, dtype=dtype, device=importance.device)
    positions = torch.arange(columns, device=importance.device)
    rows = max(1, CHUNK // max(1, columns))
    for part, ranks in zip(importance.split(rows), rank.split(rows), strict=True):
        keys = _ordered_bits(part).long().bitwise_left_shift_(32).bitwise_or_(positions)
        order = _sort_rows(keys).bitwise_and_(0xFFFFFFFF)
        ranks.scatter_(1, order, positions.to(dtype).expand_as(order))
    return rank


def _ordered_bits(values: Tensor) -> Tensor:
    """Whole numbers in the order of the floats: their bits, those below the sign inverted where it is set."""
    assert values.dtype != torch.float64, "importances are fp32 or narrower"
    bits = (values.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0, its equal
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _sort_rows(keys: Int64[Tensor, "row column"]) -> Int64[Tensor, "row column"]:
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values
    sort_rows_(keys)
    return keys
