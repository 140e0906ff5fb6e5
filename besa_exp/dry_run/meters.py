"""Time and memory of a piece of work, on a CPU or a CUDA device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psutil
import torch


class PeakMemory:
    """The most memory held since the last lap: torch's own on a CUDA device, else this process's resident bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._process = psutil.Process()
        self._most = 0
        self._ended = threading.Event()

    def __enter__(self) -> PeakMemory:
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if self.device.type != "cuda":
            self._watcher.start()
        self.lap()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def now(self) -> int:
        """Bytes held at this moment."""
        return (
            torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else self._process.memory_info().rss
        )

    def lap(self) -> int:
        """Bytes at the peak; the next lap begins."""
        if self.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return most
        most, self._most = max(self._most, self.now()), self.now()
        return most

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self._most = max(self._most, self._process.memory_info().rss)


def seconds_of(device: torch.device, work: Callable[[], object]) -> float:
    """How long `work` takes, the device's part included."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    started = now()
    work()
    return now() - started
