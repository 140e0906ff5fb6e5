"""Positions of weights in their rows by importance."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rank_in_row(importance: Float[Tensor, "out in"]) -> Int[Tensor, "out in"]:
    """Position of each weight in its row by importance, 0 = least; ties by position. 2 bytes a weight up to 32,767
    inputs, 4 beyond."""
    order = torch.argsort(importance, dim=1, stable=True)
    columns = importance.shape[1]
    dtype = torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32
    positions = torch.arange(columns, dtype=dtype, device=importance.device).expand_as(order)
    return torch.empty_like(order, dtype=dtype).scatter_(1, order, positions)
