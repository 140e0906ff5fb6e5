"""Where the hidden states between blocks lie: with the model on its device, in the host's memory, or in files.

They are the largest part of pruning a large model: 128 samples of 2,048 tokens of a 70B model take 4.3 GB in bf16, and
the block loop holds them twice (inputs and targets), with targets from dense inputs four times. What a search over the
whole model holds of all blocks has the same places.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from besa_exp.errors import RunError
from besa_exp.machine.memory import free_memory

Allocate = Callable[[torch.Size, torch.dtype], Tensor]
SHARE_OF_FREE = 0.4  # of the memory that is free, which activations may take before `auto` goes to a slower place
OF_ALL_BLOCKS = 0.8  # and what is held of all blocks when activations have their place: one block's work is left


def activation_bytes(samples: int, seq_len: int, hidden: int, itemsize: int, dense_targets: bool) -> int:
    """What the hidden states of the block loop take: inputs and targets, and their dense counterparts."""
    return samples * seq_len * hidden * itemsize * (4 if dense_targets else 2)


def allocator(
    kind: str, device: torch.device, folder: Path, needed: int, share: float = SHARE_OF_FREE
) -> tuple[str, Allocate]:
    """Where to, and a function that gives room for one tensor there. `kind` auto chooses the fastest place of whose
    free memory `needed` bytes are less than the `share`. Files in `folder` have no name, so that they go when the
    process does."""
    place = _choose(device, needed, share) if kind == "auto" else kind
    if place == "device":
        return place, lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device)
    if place == "host":
        return place, lambda shape, dtype: torch.empty(shape, dtype=dtype)
    return place, lambda shape, dtype: _in_a_file(shape, dtype, folder)


def _choose(device: torch.device, needed: int, share: float) -> str:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later tensors is free too
        if needed < share * torch.cuda.mem_get_info(device)[0]:
            return "device"
    if needed < share * free_memory():
        return "host" if device.type == "cuda" else "device"
    return "disk"


def _in_a_file(shape: torch.Size, dtype: torch.dtype, folder: Path) -> Tensor:
    """Mapped memory; the system writes it out when it needs the room. RunError: the disk has not as much. All of it is
    taken at once: a full disk met through mapped memory ends the process without a word (SIGBUS)."""
    if not (size := shape.numel() * dtype.itemsize):  # a rank that owns no sample: no file can be mapped
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".activations-") as file:
        try:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise RunError(
                f"{folder}: {size / 1e6:.1f} MB that are to lie in a file do not fit on this disk ({error.strerror}); "
                "free disk space, lower calibration.num_samples, or set activations=host"
            ) from error
        return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=dtype).view(shape)
