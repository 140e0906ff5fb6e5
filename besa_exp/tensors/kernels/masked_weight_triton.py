"""The weight under a hard mask that is never stored, in one pass on a GPU; `masked_weight.py` is the specification."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]  # not installed everywhere
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor

TILE = 4096  # weights of a program: 32 a thread, so that many loads are in flight
WIDTH = 1024  # columns of a tile at most: 2 KB runs of a bf16 row, and whole rows together where they are short


@triton.jit
@no_type_check  # compiled by Triton, not called by Python: annotations are not types here
def _kernel(
    weight, rank, pruned, out, rows, columns,
    weight_row, weight_column, rank_row, rank_column, pruned_row, out_row, out_column,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    line = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    cut = tl.load(pruned + line * pruned_row, mask=line < rows, other=0).to(tl.int32)[:, None]  # not once a weight
    row, column = line[:, None], (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)[None, :]
    inside = (row < rows) & (column < columns)
    position = tl.load(rank + row * rank_row + column * rank_column, mask=inside, other=0).to(tl.int32)
    values = tl.load(weight + row * weight_row + column * weight_column, mask=inside, other=0).to(tl.float32)
    kept = tl.where(position >= cut, values, 0.0)
    tl.store(out + row * out_row + column * out_column, kept.to(out.dtype.element_ty), mask=inside)


def masked_weight(
    weight: Float[Tensor, "out in"],
    rank: Int[Tensor, "out in"],
    pruned: Int[Tensor, " out"],
    out: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "out in"]:
    """`out` may be `weight` itself. Writes +0 where W is negative, inf or NaN too."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if out is None else out
    rows, columns = weight.shape
    if not weight.numel():
        return out
    width = min(WIDTH, triton.next_power_of_2(columns))
    height = TILE // width
    _kernel[triton.cdiv(rows, height), triton.cdiv(columns, width)](
        weight, rank, pruned, out, rows, columns,
        *weight.stride(), *rank.stride(), *pruned.stride(), *out.stride(),
        BLOCK_ROWS=height, BLOCK_COLUMNS=width,
    )  # fmt: skip
    torch.autograd.graph.increment_version(out)  # as PyTorch does: autograd then sees that `out` was overwritten
    return out
