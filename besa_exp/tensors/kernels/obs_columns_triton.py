"""SparseGPT's column loop within a group (Frantar and Alistarh, arXiv 2301.00774, Algorithm 1) on a GPU;
`obs_columns.py` is the specification.

A program keeps its rows' weights of the whole group in registers from the first column to the last. A column is final
once the loop has passed it, so the errors need no memory of their own: e = w / diag(U) of what is left at the end."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]  # not installed everywhere
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Bool, Float
from torch import Tensor

from besa_exp.tensors.kernels.obs_columns import obs_columns as reference

TILE = 2048  # weights of a program: 16 a thread; 16 rows of 128 columns make 256 programs of a 4096-row linear
LARGEST = 256  # columns of a group that registers hold with enough rows beside each other


@triton.jit
@no_type_check  # compiled by Triton, not called by Python: annotations are not types here
def _kernel(
    weight, factor, keep_mask, updated, errors, rows, group,
    weight_row, weight_column, factor_row, factor_column, mask_row, mask_column,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)[None, :]
    inside = (row < rows) & (column < group)
    w = tl.load(weight + row * weight_row + column * weight_column, mask=inside, other=0.0)
    kept = tl.load(keep_mask + row * mask_row + column * mask_column, mask=inside, other=1) != 0
    for j in range(group):
        line = factor + tl.cast(j, tl.int64) * factor_row
        pruned = tl.sum(tl.where((column == j) & ~kept, w, 0.0), axis=1)  # w_j, or 0 where it is kept
        error = tl.div_rn(pruned, tl.load(line + j * factor_column))
        later = tl.load(line + column * factor_column, mask=(column > j) & (column < group), other=0.0)
        w -= error[:, None] * later
    diagonal = tl.load(factor + column * (factor_row + factor_column), mask=column < group, other=1.0)
    here = row * group + column
    tl.store(updated + here, tl.where(kept, w, 0.0), mask=inside)
    tl.store(errors + here, tl.where(kept, 0.0, tl.div_rn(w, diagonal)), mask=inside)


def obs_columns(
    weight: Float[Tensor, "out group"],
    factor: Float[Tensor, "group group"],
    keep_mask: Bool[Tensor, "out group"],
) -> tuple[Float[Tensor, "out group"], Float[Tensor, "out group"]]:
    rows, group = weight.shape
    if group > LARGEST or not weight.dtype == factor.dtype == torch.float32:
        return reference(weight, factor, keep_mask)
    updated = torch.empty(rows, group, dtype=torch.float32, device=weight.device)
    errors = torch.empty_like(updated)
    if not weight.numel():
        return updated, errors
    width = triton.next_power_of_2(group)
    height = TILE // width
    _kernel[(triton.cdiv(rows, height),)](
        weight, factor, keep_mask, updated, errors, rows, group,
        *weight.stride(), *factor.stride(), *keep_mask.stride(),
        BLOCK_ROWS=height, BLOCK_COLUMNS=width,
    )  # fmt: skip
    return updated, errors
