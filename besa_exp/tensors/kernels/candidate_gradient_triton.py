"""The gradient with respect to the probabilities of candidate sparsities (BESA, Eq. 3 and 4), in one pass on a GPU;
`candidate_gradient.py` is the specification.

Every weight is compared with every cut and added where it lies below: no scatter, no atomics, no sort of the cuts, the
sums stay in registers. That is weights x candidates compare-and-adds, so arithmetic and not memory is the floor for the
paper's 101 candidates."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]  # not installed everywhere
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor

TILE = 4096  # partial sums of a program, columns x candidates: 32 registers a thread
CANDIDATES = 256  # of a program at most: at least 16 columns are then summed side by side
STEPS = 64  # terms of a partial sum in fp32; these few are then added in fp64, as cheap and far below fp32's rounding


@triton.jit
@no_type_check  # compiled by Triton, not called by Python: annotations are not types here
def _kernel(
    weight, gradient, rank, cuts, out, columns, candidates,
    weight_row, weight_column, gradient_row, gradient_column, rank_row, rank_column, cuts_stride,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_CANDIDATES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    candidate = tl.program_id(1) * BLOCK_CANDIDATES + tl.arange(0, BLOCK_CANDIDATES)
    cut = tl.load(cuts + candidate * cuts_stride, mask=candidate < candidates, other=0).to(tl.int32)[None, :]
    total = tl.zeros([BLOCK_CANDIDATES], dtype=tl.float64)
    for first in range(0, columns, STEPS * BLOCK_COLUMNS):
        part = tl.zeros([BLOCK_COLUMNS, BLOCK_CANDIDATES], dtype=tl.float32)
        for start in range(first, tl.minimum(first + STEPS * BLOCK_COLUMNS, columns), BLOCK_COLUMNS):
            column = (start + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
            inside = column < columns
            position = tl.load(rank + row * rank_row + column * rank_column, mask=inside, other=0).to(tl.int32)
            w = tl.load(weight + row * weight_row + column * weight_column, mask=inside, other=0).to(tl.float32)
            g = tl.load(gradient + row * gradient_row + column * gradient_column, mask=inside, other=0).to(tl.float32)
            part += tl.where(position[:, None] < cut, (w * g)[:, None], 0.0)
        total += tl.sum(part.to(tl.float64), axis=0)
    tl.store(out + row * candidates + candidate, -total.to(tl.float32), mask=candidate < candidates)


def candidate_gradient(
    weight: Float[Tensor, "out in"],
    gradient: Float[Tensor, "out in"],
    rank: Int[Tensor, "out in"],
    cuts: Int[Tensor, " candidate"],
) -> Float[Tensor, "out candidate"]:
    rows, columns = weight.shape
    out = torch.empty(rows, len(cuts), dtype=torch.float32, device=weight.device)
    if not out.numel():
        return out
    width = min(CANDIDATES, max(16, triton.next_power_of_2(len(cuts))))
    _kernel[rows, triton.cdiv(len(cuts), width)](
        weight, gradient, rank, cuts, out, columns, len(cuts),
        *weight.stride(), *gradient.stride(), *rank.stride(), *cuts.stride(),
        BLOCK_COLUMNS=TILE // width, BLOCK_CANDIDATES=width, STEPS=STEPS,
    )  # fmt: skip
    return out
