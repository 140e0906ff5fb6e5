"""The k-th smallest of a long row, found by counting how many numbers are no larger than a few that lie between.

`kthvalue` and `topk` give one block of a GPU's threads to each row, 6.8 ns a number, and index with 32 bits. Here the
bits of fp32 numbers are integers of the same order, and those of the k-th smallest are found from the highest on, by
counts over the whole row: all threads count, integers add up to the same in any order, rows may be longer than 2^31.
Nothing is read by the host on the way, as `bincount` of digits would have it (twice a call), and no second row is made.
"""

from __future__ import annotations

from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

SHORT, SEVERAL = 2**22, 4  # up to SHORT numbers launches cost most: SEVERAL bits a round; above comparisons: one
AT_ONCE = 2**26  # numbers that are compared together, at a byte for each comparison
LONG = 2**16  # rows above are selected from by counting on a GPU
INFINITY = 0x7F800000  # its bits; above are those of NaN


def kth_smallest(values: Float[Tensor, " row"], k: Int[Tensor, ""] | int) -> Float[Tensor, ""]:
    """The `k`-th smallest of the fp32 `values`, from 1; NaN counts as larger than all, and 0 equals -0."""
    assert values.dtype == torch.float32, f"fp32 numbers are ordered by their bits, not {values.dtype}"
    bits = SEVERAL if len(values) <= SHORT else 1
    steps = torch.arange(1, 2**bits, device=values.device)
    below = torch.full((), -(2**31), device=values.device)  # fewer than k are no larger than the number there
    for shift in range(32 - bits, -1, -bits):
        between = _numbers(torch.add(below, steps, alpha=2**shift).clamp(max=INFINITY))[:, None]
        counts = reduce(torch.add, ((part <= between).sum(dim=1) for part in values.split(AT_ONCE)))
        below = torch.add(below, (counts < k).sum(), alpha=2**shift)
    return _numbers(below + 1)


def _numbers(places: Int[Tensor, "*place"]) -> Float[Tensor, "*place"]:
    """The fp32 numbers at these places of their order: of a negative one all bits but the sign are turned."""
    places = places.to(torch.int32)
    return (places ^ ((places >> 31) & (2**31 - 1))).view(torch.float32)
