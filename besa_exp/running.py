"""A run under way: what its parts are given."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from besa_exp.console import RunConsole
from besa_exp.followed_folder import FollowedFolder
from besa_exp.run_folder import RunFolder
from besa_exp.settings import RunSettings


@dataclass(frozen=True)
class Run:
    """One run under way: what is asked, where it is written and shown, and the seconds spent on each part."""

    settings: RunSettings
    device: torch.device
    folder: RunFolder | FollowedFolder
    console: RunConsole
    seconds: dict[str, float]

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time of the block to `part`, and the processor time of all threads, which other programs on the
        machine do not lengthen, to `part`_processor."""
        started, worked = time.perf_counter(), time.process_time()
        yield
        self._add(part, time.perf_counter() - started)
        self._add(f"{part}_processor", time.process_time() - worked)

    def _add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds
