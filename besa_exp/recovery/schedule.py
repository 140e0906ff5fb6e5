"""The step size and the windows of a step, as pure functions of its number: a run that goes on needs no history."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from besa_exp.settings import Schedules


@dataclass(frozen=True)
class Schedule:
    """The factor of the step size over `steps` steps: it rises linearly over `warm_up` of them, then falls by `shape`
    to 0."""

    steps: int
    warm_up: int = 0
    shape: Schedules = "cosine"

    def __post_init__(self) -> None:
        assert 0 <= self.warm_up < self.steps

    def scale(self, step: int) -> float:
        """The factor at `step`, which counts from 0."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        if self.shape == "constant":
            return 1.0
        done = (step - self.warm_up) / (self.steps - self.warm_up)
        return 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2


def key_of(*words: object) -> int:
    """A seed in [0, 2^63) that depends on the words alone: not on the order in which seeds are asked for, on processes
    or devices, as what a generator gives next would."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def batch_at(step: int, num_windows: int, batch_size: int, seed: int) -> Int[Tensor, " sample"]:
    """The numbers of the windows of a step. Every window is used once before any comes again, in an order of its own in
    each pass; a batch may end one pass and begin the next."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return torch.tensor([int(_order(seed, place // num_windows, num_windows)[place % num_windows]) for place in places])


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_windows: int) -> Int[Tensor, " window"]:
    """The order of the windows in one pass."""
    generator = torch.Generator().manual_seed(key_of("order", seed, epoch))
    return torch.randperm(num_windows, generator=generator)
