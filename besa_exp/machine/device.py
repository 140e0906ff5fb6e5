"""The device of a run, its seeds and determinism, and the memory that the run took."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor

from besa_exp.machine import distributed
from besa_exp.settings import EvaluationSettings, RunSettings


def prepared_device(settings: RunSettings | EvaluationSettings) -> torch.device:
    """Sets seeds and determinism and returns the device: auto is a GPU where there is one, one for each rank."""
    set_determinism(settings.seed, settings.deterministic)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return distributed.local_device(torch.device(automatic if settings.device == "auto" else settings.device))


def set_determinism(seed: int, deterministic: bool) -> None:
    """Seeds torch, and lets it use deterministic algorithms alone, with a warning where there is none."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Else every torch.empty is filled: time in each step, and memory for modules built without weights.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def compute_dtype(settings: RunSettings) -> torch.dtype | None:
    """What the block loop computes products in; None: the weights' dtype."""
    return None if settings.compute_dtype == "auto" else getattr(torch, settings.compute_dtype)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Most bytes held so far by this process on the host, and by torch on the device."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"host": host, "device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0}


def memory_taken(device: torch.device) -> Callable[[], int]:
    """What gives the most bytes that were taken on the device since now. Linux alone forgets an earlier peak of the
    host: elsewhere those below it do not count."""
    place = "device" if device.type == "cuda" else "host"
    if place == "device":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = peak_memory(device)[place]
    return lambda: peak_memory(device)[place] - before


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous on the CPU; a GPU's are copied together, into pinned memory, which takes a quarter of the time, and in
    a stream of their own: what is computed meanwhile does not wait for the copies."""
    sides = {tensor.device: torch.cuda.Stream(tensor.device) for tensor in tensors.values() if tensor.is_cuda}
    for device, side in sides.items():
        side.wait_stream(torch.cuda.current_stream(device))
    found = {}
    for name, tensor in tensors.items():
        with torch.cuda.stream(sides[tensor.device]) if tensor.is_cuda else nullcontext():
            found[name] = tensor.contiguous().to("cpu", non_blocking=True)
    for side in sides.values():
        side.synchronize()
    return found


def seconds_of(device: torch.device, work: Callable[[], object]) -> float:
    """How long `work` takes, the device's part included."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    started = now()
    work()
    return now() - started
