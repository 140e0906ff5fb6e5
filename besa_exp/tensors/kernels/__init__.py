"""The inner loops of pruning, each where it runs fastest.

`<op>.py` is plain PyTorch and the specification; `<op>_triton.py` holds the kernel of the same name and signature that
takes over on a CUDA device where Triton is installed. Callers write `kernels.masked_weight(...)` and get the right one.
The kernels use no atomics: they give the same bits each time, whatever `torch.use_deterministic_algorithms` says. They
are not differentiable: with a gradient to record, the reference runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from besa_exp.tensors.kernels.candidate_gradient import candidate_gradient as _candidate_gradient
from besa_exp.tensors.kernels.count_gradient import count_gradient as _count_gradient
from besa_exp.tensors.kernels.count_gradient import weights_around as weights_around
from besa_exp.tensors.kernels.masked_weight import masked_weight as _masked_weight
from besa_exp.tensors.kernels.obs_columns import obs_columns as _obs_columns
from besa_exp.tensors.kernels.rank_in_row import rank_in_row as _rank_in_row

P = ParamSpec("P")
R = TypeVar("R")

HAS_TRITON = importlib.util.find_spec("triton") is not None


def _where_fastest(reference: Callable[P, R]) -> Callable[P, R]:
    """`reference`, or its Triton kernel when the tensors lie on a CUDA device and no gradient is to be recorded."""

    @functools.cache
    def kernel() -> Callable[P, R]:  # imported at its first use: Triton takes a second to import
        return getattr(importlib.import_module(f"{reference.__module__}_triton"), reference.__name__)

    @functools.wraps(reference)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if not HAS_TRITON or recorded or not all(tensor.is_cuda for tensor in tensors):
            return reference(*args, **kwargs)
        with torch.cuda.device(tensors[0].device):  # Triton launches on the current device, whatever its arguments say
            return kernel()(*args, **kwargs)

    return op


candidate_gradient = _where_fastest(_candidate_gradient)
count_gradient = _where_fastest(_count_gradient)
masked_weight = _where_fastest(_masked_weight)
obs_columns = _where_fastest(_obs_columns)
rank_in_row = _where_fastest(_rank_in_row)
