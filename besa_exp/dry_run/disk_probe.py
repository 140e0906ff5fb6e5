"""How fast the disk of a run folder writes, and how fast files are read again and hashed: tens of megabytes, then gone.

Reading comes from the system's cache, as it does for files that were just written or read; a cold disk takes longer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from besa_exp.checkpoints.files import weights_sha256
from besa_exp.machine import atomic

SMALL, LARGE = 2**16, 2**25  # bytes


@dataclass(frozen=True)
class DiskSpeed:
    """Seconds for a file however small, and seconds a byte: to write it durably, to read it, to hash it."""

    file: float
    write: float
    read: float
    hash: float

    def written(self, size: int, files: int = 1) -> float:
        """Seconds for `files` of `size` bytes together."""
        return files * self.file + size * self.write


def existing_place(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place


def disk_speed(folder: Path) -> DiskSpeed:
    """Measured beside `folder`, which need not exist."""
    with tempfile.TemporaryDirectory(dir=existing_place(folder), prefix=".besa-probe-") as place:
        path = Path(place, "probe.safetensors")
        drawn = torch.randint(-(2**62), 2**62, (LARGE // 8,)).view(torch.uint8)  # what no file system makes smaller

        def write(size: int) -> None:
            with atomic.replaced_file(path) as partial:
                save_file({"probe": drawn[:size]}, partial)

        small = min(_seconds(lambda: write(SMALL)) for _ in range(3))
        large = min(_seconds(lambda: write(LARGE)) for _ in range(2))
        tensors = load_file(path)
        read = _seconds(load_file(path)["probe"].clone)
        hashed = _seconds(lambda: weights_sha256(tensors))
    return DiskSpeed(small, max(0.0, large - small) / LARGE, read / LARGE, hashed / LARGE)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
