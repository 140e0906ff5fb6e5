"""In which dtype a CPU computes: 16-bit numbers only where it multiplies them itself, else fp32.

A CPU without such units converts every product's operands, several times slower than fp32. No CPU is given fp16: few
multiply it, and its range is too small for what BESA differentiates. Weights keep their values, which fp32 holds
exactly, and what is saved its dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from besa_exp.blocks.pruner import PrunedBlock, Pruner, Task, Traits
from besa_exp.checkpoints.load import SHARE_OF_FREE, LoadedModel
from besa_exp.machine.memory import free_memory

BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux names them on x86 and, last, on Arm
logger = logging.getLogger(__name__)


def multiplies(dtype: torch.dtype, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU computes in `dtype` at its full speed. Where the system does not say what it has, as
    on a Mac, bf16 is taken to be there."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if dtype == torch.float16:
        return False
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return True
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return not flags or bool(flags & BF16_UNITS)


def in_a_fast_dtype(loaded: LoadedModel, asked: str) -> LoadedModel:
    """The model as it is computed with: in fp32, with a note, where it lies on a CPU that is slow in its dtype, and no
    other was asked for than as saved (auto)."""
    model, stored = loaded.model, loaded.model.dtype
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    on_cpu = all(parameter.device.type in ("cpu", "meta") for parameter in floating)
    alike = all(parameter.dtype == stored for parameter in floating)  # what is kept in fp32 is known to its class alone
    if asked != "auto" or not on_cpu or not alike or multiplies(stored):
        return loaded
    name = str(stored).removeprefix("torch.")
    more = sum(4 * parameter.numel() for parameter in floating)
    if loaded.weights is None and more > SHARE_OF_FREE * free_memory():
        note = f"it is computed in {name}, slowly on this CPU: in fp32 it would not easily fit into memory"
        return _noted(loaded, note)
    torch.nn.Module.to(model, torch.float32)
    note = f"its weights are {name}; this CPU is slow in it, so that all is computed in fp32 and saved in {name}"
    weights = replace(loaded.weights, computed=torch.float32) if loaded.weights else None
    return _noted(replace(loaded, weights=weights, stored=stored), note)


def _noted(loaded: LoadedModel, note: str) -> LoadedModel:
    logger.warning("%s: %s", loaded.folder.name, note)
    return replace(loaded, notes=(*loaded.notes, note))


def as_stored(tensors: Mapping[str, Tensor], stored: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors as they are saved; None: as they are."""
    return {
        name: tensor.to(stored) if stored and tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }


@dataclass(frozen=True)
class Rounding:
    """A pruner whose new weights are what `stored` can hold."""

    pruner: Pruner
    stored: torch.dtype

    @property
    def traits(self) -> Traits:
        return self.pruner.traits

    def check(self, sparsity: float, pattern: str) -> list[str]:
        return self.pruner.check(sparsity, pattern)

    def prune_block(self, task: Task) -> PrunedBlock:
        pruned = self.pruner.prune_block(task)
        weights, norms = (self._rounded(values or {}) for values in (pruned.weights, pruned.norms))
        return replace(pruned, weights=weights or None, norms=norms)

    def _rounded(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.stored).to(value.dtype) for name, value in values.items()}
