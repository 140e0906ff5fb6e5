"""Which FFNs a token skips while a model decodes: rules of tensors alone.

FFN-SkipLLM (Jaiswal et al., arXiv 2404.03865): with a the state between attention and FFN, f the FFN's part and
sim = cos(a, a + f): once sim >= threshold in a block, the FFNs of the next `span` blocks are skipped for this token.
The first and last blocks never skip, nor do the first decoded tokens (25 to 30 are enough, the paper finds; the preset
spares none), nor the prompt's. No code was published; the span, the cold blocks and the warm tokens are settings here.
Beside it: the same blocks for every token; chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Numbers = Int[Tensor, "sample seq"]
"""Of each token its number among the decoded ones, from 0; negative: it belongs to the prompt or pads."""
Skipped = Bool[Tensor, "sample seq"]
ALL = 2**30  # a span up to the cold end
TRIES = 14  # of a bisection


@dataclass(frozen=True)
class FfnSkipping:
    """FFN-SkipLLM's greedy rule. `span`: None, up to the cold end."""

    threshold: float
    span: int | None = 1
    cold_first: int = 1
    cold_last: int = 1
    warm_tokens: int = 0

    def skips(self, block: int, num_blocks: int, left: Numbers, numbers: Numbers) -> Skipped:
        """Where any of the FFNs to skip are `left`, in blocks that are not cold."""
        return self._may(block, num_blocks, numbers) & (left > 0)

    def left_after(
        self, block: int, num_blocks: int, left: Numbers, numbers: Numbers, similarity: Float[Tensor, "sample seq"]
    ) -> Numbers:
        """One fewer where it was skipped; the span where the FFN ran and hardly turned the state. `similarity` means
        nothing where it was skipped."""
        may = self._may(block, num_blocks, numbers)
        begins = may & (left == 0) & (similarity >= self.threshold)
        return torch.where(begins, self.span or ALL, torch.where(may & (left > 0), left - 1, left))

    def is_cold(self, block: int, num_blocks: int) -> bool:
        """Whether the block never skips, nor says that others do."""
        return not self.cold_first <= block < num_blocks - self.cold_last

    def _may(self, block: int, num_blocks: int, numbers: Numbers) -> Skipped:
        cold = self.is_cold(block, num_blocks)
        return torch.zeros_like(numbers, dtype=torch.bool) if cold else numbers >= self.warm_tokens


@dataclass(frozen=True)
class StaticSkipping:
    """The FFNs of the same blocks for every decoded token."""

    blocks: tuple[int, ...]
    warm_tokens: int = 0

    def skips(self, block: int, num_blocks: int, left: Numbers, numbers: Numbers) -> Skipped:
        """Those of `blocks`."""
        return (numbers >= self.warm_tokens) & (block in self.blocks)


@dataclass(frozen=True)
class RandomSkipping:
    """Each FFN of a decoded token with the probability `fraction`, drawn by seed, block and the token's number."""

    fraction: float
    seed: int = 0
    warm_tokens: int = 0

    def skips(self, block: int, num_blocks: int, left: Numbers, numbers: Numbers) -> Skipped:
        """By a hash of the three numbers, so that one pass and token by token draw alike."""
        mixed = (numbers.long() + 1) * 2_654_435_761 + (block + 1) * 40_503_551 + (self.seed + 1) * 97_531_357
        mixed = ((mixed ^ (mixed >> 15)) * 2_246_822_519) % 2**32
        mixed = ((mixed ^ (mixed >> 13)) * 3_266_489_917) % 2**32
        return (numbers >= self.warm_tokens) & ((mixed ^ (mixed >> 16)) % 2**24 < self.fraction * 2**24)


Policy = FfnSkipping | StaticSkipping | RandomSkipping


def decoded_numbers(shape: torch.Size | tuple[int, int], prompt_tokens: int) -> Numbers:
    """Of sequences whose first tokens are a prompt, and that hold no paddings."""
    return (torch.arange(shape[1]) - prompt_tokens).expand(shape).clone()


def threshold_for(wanted: float, fraction_of: Callable[[float], float]) -> tuple[float, float]:
    """The threshold under which nearest to the `wanted` fraction of FFNs is skipped, of those that bisection tried, and
    that fraction. `fraction_of` computes a pass. The fraction need not fall with the threshold: what is skipped changes
    what comes after; so the nearest of all tried is taken."""
    low, high = -1.0, 1.0
    tried = {bound: fraction_of(bound) for bound in (low, high)}
    for _ in range(TRIES):
        between = (low + high) / 2
        tried[between] = fraction_of(between)
        low, high = (between, high) if tried[between] > wanted else (low, between)
    best = min(tried, key=lambda bound: (abs(tried[bound] - wanted), -bound))
    return best, tried[best]
