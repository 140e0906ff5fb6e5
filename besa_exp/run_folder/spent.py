"""The seconds and the memory that a run has taken, over all its attempts.

`spent.json` of the run folder holds them as they were when the last block or score was kept, or was about to be: what
an attempt did after that is lost with it, and so is its time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from besa_exp.machine import atomic


class Spent:
    """What earlier attempts have left in `path`, and this one adds; `memory` gives the peak of this one by place."""

    def __init__(self, path: Path, memory: Callable[[], Mapping[str, int]]):
        self._path, self._memory = path, memory
        self._earlier_memory: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._parts: list[tuple[str, float, float]] = []  # under way: name, and the two clocks when it began
        self._read()
        self._began = time.perf_counter() - self._seconds.pop("total", 0.0)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time of the block to `part`, and the processor time of all threads, which other programs on the
        machine do not lengthen, to `part`_processor."""
        under_way = (part, time.perf_counter(), time.process_time())
        self._parts.append(under_way)
        try:
            yield
        finally:
            self._parts.remove(under_way)
            self._seconds = _added(self._seconds, [under_way])

    def seconds(self) -> dict[str, float]:
        """By part, and `total`."""
        return _added(self._seconds, self._parts) | {"total": time.perf_counter() - self._began}

    def peak_memory(self) -> dict[str, int]:
        """The largest of all attempts, in bytes, by place."""
        return {place: max(size, self._earlier_memory.get(place, 0)) for place, size in self._memory().items()}

    def keep(self) -> None:
        """Has the next attempt count from here on."""
        content = {"seconds": self.seconds(), "peak_memory_bytes": self.peak_memory()}
        atomic.write_text(self._path, json.dumps(content) + "\n")

    def _read(self) -> None:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            self._seconds = {str(part): float(seconds) for part, seconds in content["seconds"].items()}
            self._earlier_memory = {str(place): int(size) for place, size in content["peak_memory_bytes"].items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):  # none, or a damaged one
            self._seconds, self._earlier_memory = {}, {}


def _added(seconds: Mapping[str, float], parts: Sequence[tuple[str, float, float]]) -> dict[str, float]:
    """`seconds` and what the parts have taken since they began."""
    found, now, worked = dict(seconds), time.perf_counter(), time.process_time()
    for part, began, working in parts:
        found[part] = found.get(part, 0.0) + now - began
        found[f"{part}_processor"] = found.get(f"{part}_processor", 0.0) + worked - working
    return found
