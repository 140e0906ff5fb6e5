"""How often the host would wait for a GPU, counted on a CPU by the calls that make it wait."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

READS = {"item", "tolist", "cpu", "__float__", "__int__", "__bool__", "__index__"}


class HostWaits(TorchFunctionMode):
    """`reads`: of numbers that were computed, by the name of the call. `sends`: of token ids that are copied without
    leave to go on. The ids and places that the host itself holds are integers, and are no reads."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.sends = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, subject = getattr(func, "__name__", ""), args[0] if args else None
        if isinstance(subject, Tensor):
            self.reads += [name] * (name in READS and (subject.is_floating_point() or subject.dtype == torch.bool))
            to_device = name == "to" and any(isinstance(each, torch.device) for each in args[1:])
            self.sends += to_device and subject.dtype == torch.int64 and not (kwargs or {}).get("non_blocking")
        return func(*args, **(kwargs or {}))
