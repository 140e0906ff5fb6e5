"""The k-th smallest of a long row, found by counting: two passes over the numbers instead of a sort.

`kthvalue` and `topk` give one block of a GPU's threads to each row, 6.8 ns a number, and index with 32 bits. Here the
bits of an fp32 number become an integer of the same order, and the k-th smallest of those is found digit by digit, 16
bits at a time, from the counts of each digit (radix selection). All threads count, integers add up to the same in any
order, nothing waits for the host, and rows may be longer than 2^31.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

BITS = 16  # of a digit
AT_ONCE = 2**26  # numbers whose digits are held together, at 8 bytes each
LONG = 2**16  # rows above are selected from by counting on a GPU


def kth_smallest(values: Float[Tensor, " row"], k: Int[Tensor, ""] | int) -> Float[Tensor, ""]:
    """The `k`-th smallest of the fp32 `values`, from 1; NaN counts as larger than all, -0 as smaller than 0."""
    assert values.dtype == torch.float32, f"fp32 numbers are ordered by their bits, not {values.dtype}"
    left = torch.as_tensor(k, device=values.device, dtype=torch.int64)
    high, left = _digit(values, left, None)
    low, _ = _digit(values, left, high)
    ordered = ((high - 2 ** (BITS - 1)) << BITS) | low
    return _bits(ordered.to(torch.int32)).view(torch.float32)


def _digit(
    values: Float[Tensor, " row"], left: Int[Tensor, ""], high: Int[Tensor, ""] | None
) -> tuple[Int[Tensor, ""], Int[Tensor, ""]]:
    """The digit of the number in place `left`, its high one, or its low one among those whose high one is `high`; and
    its place among the numbers that have this digit."""
    counts = torch.zeros(2**BITS, dtype=torch.int64, device=values.device)
    for part in values.split(AT_ONCE):
        ordered = _bits(part.contiguous().view(torch.int32)).where(~part.isnan(), 2**31 - 1)
        upper = (ordered >> BITS).long() + 2 ** (BITS - 1)
        if high is None:
            counts.scatter_add_(0, upper, torch.ones_like(upper))
        else:
            counts.scatter_add_(0, (ordered & (2**BITS - 1)).long(), (upper == high).long())
    up_to = counts.cumsum(dim=0)  # of integers: the same in any order
    digit = (up_to < left).sum()
    return digit, left - (up_to - counts)[digit]


def _bits(bits: Int[Tensor, "*numbers"]) -> Int[Tensor, "*numbers"]:
    """The bits of fp32 numbers as integers of the same order, and back: of a negative number all but the sign turn."""
    return bits ^ ((bits >> 31) & (2**31 - 1))
