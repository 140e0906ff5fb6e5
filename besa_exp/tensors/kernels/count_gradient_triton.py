"""The gradient with respect to how many weights a row gives up, in one pass on a GPU; `count_gradient.py` is the
specification."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]  # not installed everywhere
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor

TILE = 2048  # weights a program holds at once: 16 a thread of three tensors each, without spilling registers
WIDTH = 2048  # columns of a tile at most: one wide row a program, several short ones


@triton.jit
@no_type_check  # compiled by Triton, not called by Python: annotations are not types here
def _kernel(
    weight, gradient, rank, pruned, out, rows, columns, half,
    weight_row, weight_column, gradient_row, gradient_column, rank_row, rank_column, pruned_row,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    cut = tl.load(pruned + row * pruned_row, mask=row < rows, other=0).to(tl.float32)
    first = tl.maximum(tl.ceil(cut - half), 0.0).to(tl.int32)[:, None]
    end = tl.minimum(tl.ceil(cut + half), columns * 1.0).to(tl.int32)[:, None]
    line = row[:, None]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = (start + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)[None, :]
        inside = (line < rows) & (column < columns)
        position = tl.load(rank + line * rank_row + column * rank_column, mask=inside, other=-1).to(tl.int32)
        near = (position >= first) & (position < end)
        w = tl.load(weight + line * weight_row + column * weight_column, mask=inside, other=0).to(tl.float32)
        g = tl.load(gradient + line * gradient_row + column * gradient_column, mask=inside, other=0).to(tl.float32)
        total += tl.where(near, w * g, 0.0)
    width = tl.minimum(cut + half, columns * 1.0) - tl.maximum(cut - half, 0.0)
    tl.store(out + row, -tl.div_rn(tl.sum(total, axis=1), width), mask=row < rows)


def count_gradient(
    weight: Float[Tensor, "out in"],
    gradient: Float[Tensor, "out in"],
    rank: Int[Tensor, "out in"],
    pruned: Int[Tensor, " out"],
    window: float,
) -> Float[Tensor, " out"]:
    rows, columns = weight.shape
    out = torch.empty(rows, dtype=torch.float32, device=weight.device)
    if not weight.numel():
        return out.zero_()
    width = min(WIDTH, triton.next_power_of_2(columns))
    height = TILE // width
    _kernel[(triton.cdiv(rows, height),)](
        weight, gradient, rank, pruned, out, rows, columns, max(float(window) / 2, 0.5),
        *weight.stride(), *gradient.stride(), *rank.stride(), *pruned.stride(),
        BLOCK_ROWS=height, BLOCK_COLUMNS=width,
    )  # fmt: skip
    return out
