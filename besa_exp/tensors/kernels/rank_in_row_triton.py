"""Positions of weights in their rows by importance, on a GPU; `rank_in_row.py` is the specification.

A stable radix sort, two bits a pass, of words that hold an order-preserving image of the importance above the column.
A row goes between two buffers that stay in the L2 cache. Four counters of 16 bits share one integer, so that a single
prefix sum places a whole tile. Rows of up to 32 weights (N:M patterns) are ranked by comparing all pairs instead."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]  # not installed everywhere
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor

from besa_exp.tensors.kernels.rank_in_row import rank_in_row as reference

TILE = 2048  # weights placed by one prefix sum: 8 a thread with 8 warps, without spilling 64-bit words
PROGRAMS = 264  # two for each SM of an H100 or H200: the buffers of a 4096-wide linear then stay in its L2 cache
LARGEST = 65535  # columns that a counter of 16 bits and a position of 16 bits can name
FEW = 32  # columns up to which all pairs are compared: no more work than the passes of a sort
PAIRS = 4096  # compared by one program: 32 a thread
FIRST_PASS = {torch.float32: 0, torch.bfloat16: 8, torch.float16: 6}  # lower digits of their fp32 images are constant


@triton.jit
@no_type_check  # compiled by Triton, not called by Python: annotations are not types here
def _sort_kernel(
    importance, rank, buffers, rows, columns, importance_row, importance_column,
    FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    one = tl.full([BLOCK], 1, dtype=tl.int64)
    buffer = buffers + tl.program_id(0).to(tl.int64) * 2 * columns
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        # Words of importance above column, and how many there are of each value of the first digit.
        counts = tl.zeros([BLOCK], dtype=tl.int64)
        for start in range(0, columns, BLOCK):
            column = (start + lane).to(tl.int64)
            inside = column < columns
            value = tl.load(importance + row * importance_row + column * importance_column, mask=inside, other=0)
            value = value.to(tl.float32)
            bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0 ties with 0
            ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000
            word = (ordered << 16) | column
            tl.store(buffer + column, word, mask=inside)
            counts += tl.where(inside, one << (word >> (16 + 2 * FIRST) & 3) * 16, 0)
        total = tl.sum(counts, axis=0)
        for step in range(FIRST, 16):
            tl.debug_barrier()  # what other threads of this program stored is read below
            source = buffer + (step - FIRST) % 2 * columns
            target = buffer + (step - FIRST + 1) % 2 * columns
            before = (total << 16) + (total << 32) + (total << 48)  # counter d: words with a digit below d
            counts = tl.zeros([BLOCK], dtype=tl.int64)
            for start in range(0, columns, BLOCK):
                inside = start + lane < columns
                word = tl.load(source + start + lane, mask=inside, other=0)
                field = (word >> (16 + 2 * step) & 3) * 16
                unit = tl.where(inside, one << field, 0)
                place = (before + tl.cumsum(unit, axis=0) - unit) >> field & 0xFFFF
                tl.store(target + place, word, mask=inside)
                before += tl.sum(unit, axis=0)
                counts += tl.where(inside, one << (word >> (18 + 2 * step) & 3) * 16, 0)  # of the next digit
            total = tl.sum(counts, axis=0)
        tl.debug_barrier()
        for start in range(0, columns, BLOCK):
            inside = start + lane < columns
            column = tl.load(buffer + (16 - FIRST) % 2 * columns + start + lane, mask=inside, other=0) & 0xFFFF
            tl.store(rank + row * columns + column, (start + lane).to(rank.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # before the next row takes the buffers


@triton.jit
@no_type_check
def _pairs_kernel(
    importance, rank, rows, columns, importance_row, importance_column,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :, None]
    other = tl.arange(0, BLOCK_COLUMNS)[None, None, :]
    start = importance + row * importance_row
    mine = tl.load(start + column * importance_column, mask=(row < rows) & (column < columns), other=0).to(tl.float32)
    theirs = tl.load(start + other * importance_column, mask=(row < rows) & (other < columns), other=0).to(tl.float32)
    before = ((theirs < mine) | ((theirs == mine) & (other < column))) & (other < columns)
    position = tl.sum(before.to(tl.int32), axis=2)[:, :, None]
    here = rank + row * columns + column
    tl.store(here, position.to(rank.dtype.element_ty), mask=(row < rows) & (column < columns))


def rank_in_row(importance: Float[Tensor, "out in"]) -> Int[Tensor, "out in"]:
    """NaN has no place."""
    rows, columns = importance.shape
    if columns > LARGEST or importance.dtype not in FIRST_PASS:
        return reference(importance)
    dtype = torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32
    rank = torch.empty(rows, columns, dtype=dtype, device=importance.device)
    if not importance.numel():
        return rank
    width = triton.next_power_of_2(columns)
    if columns <= FEW:
        height = PAIRS // width**2
        _pairs_kernel[(triton.cdiv(rows, height),)](
            importance, rank, rows, columns, *importance.stride(),
            BLOCK_ROWS=height, BLOCK_COLUMNS=width,
        )  # fmt: skip
        return rank
    programs, block = min(rows, PROGRAMS), min(TILE, width)
    buffers = torch.empty(programs, 2, columns, dtype=torch.int64, device=importance.device)
    _sort_kernel[(programs,)](
        importance, rank, buffers, rows, columns, *importance.stride(), FIRST=FIRST_PASS[importance.dtype], BLOCK=block,
        num_warps=max(1, block // 256),  # pyright: ignore[reportCallIssue]  # a launch option, not an argument
    )  # fmt: skip
    return rank
