"""The k-th smallest of a long row, found by counting: three passes over the numbers instead of a sort.

`kthvalue` and `topk` give one block of a GPU's threads to each row, 6.8 ns a number, and index with 32 bits. Here the
bits of an fp32 number become an integer of the same order, and the k-th smallest of those is found digit by digit, from
the counts of each digit (radix selection). All threads count, integers add up to the same in any order, and rows may be
longer than 2^31. Digits are short enough that each block of threads has counts of its own in its fast memory: numbers
that are equal, as are all that were pruned before, would else wait for one another. `bincount` of integers is
deterministic; torch's deterministic form of `scatter_add_` would sort the digits and add up equal ones one by one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

DIGITS = (11, 11, 10)  # bits of each, the highest first: 2^11 counts of 8 bytes are 16 of the 48 kB that a block has
AT_ONCE = 2**26  # numbers whose digits are held together, at 8 bytes each
LONG = 2**16  # rows above are selected from by counting on a GPU


def kth_smallest(values: Float[Tensor, " row"], k: Int[Tensor, ""] | int) -> Float[Tensor, ""]:
    """The `k`-th smallest of the fp32 `values`, from 1; NaN counts as larger than all, -0 as smaller than 0."""
    assert values.dtype == torch.float32, f"fp32 numbers are ordered by their bits, not {values.dtype}"
    left = torch.as_tensor(k, device=values.device, dtype=torch.int64)
    known, below = None, sum(DIGITS)  # the bits that are found, and how many are below them
    for bits in DIGITS:
        below -= bits
        counts = _counts(values, known, below, bits)
        up_to = counts.cumsum(dim=0)
        digit = (up_to < left).sum(dim=0, keepdim=True)
        left = left - (up_to - counts).gather(0, digit)[0]  # its place among the numbers that have this digit
        known = digit[0] - 2 ** (bits - 1) if known is None else (known << bits) | digit[0]
    assert known is not None
    return _bits(known.to(torch.int32)).view(torch.float32)


def _counts(
    values: Float[Tensor, " row"], known: Int[Tensor, ""] | None, below: int, bits: int
) -> Int[Tensor, " digit"]:
    """How many numbers have each digit of `bits` bits above the `below` lowest, among those whose higher bits are
    `known`; None: it is the highest digit, which has the sign in it."""
    size = 2**bits
    counts = torch.zeros(size + 1, dtype=torch.int64, device=values.device)  # the last: of all other numbers
    for part in values.split(AT_ONCE):
        ordered = _bits(part.contiguous().view(torch.int32)).where(~part.isnan(), 2**31 - 1)
        if known is None:
            digit = (ordered >> below) + size // 2
        else:
            digit = ((ordered >> below) & (size - 1)).where(ordered >> (below + bits) == known, size)
        counts += torch.bincount(digit, minlength=size + 1)
    return counts[:size]


def _bits(bits: Int[Tensor, "*numbers"]) -> Int[Tensor, "*numbers"]:
    """The bits of fp32 numbers as integers of the same order, and back: of a negative number all but the sign turn."""
    return bits ^ ((bits >> 31) & (2**31 - 1))
