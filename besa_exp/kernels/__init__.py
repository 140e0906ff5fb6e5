"""The inner loops of pruning, each where it runs fastest.

`<op>.py` is plain PyTorch and the specification; `<op>_triton.py` holds the kernel of the same name and signature that
takes over on a CUDA device where Triton is installed. Callers write `kernels.masked_weight(...)` and get the right one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor

from besa_exp.kernels.candidate_gradient import candidate_gradient as _candidate_gradient
from besa_exp.kernels.count_gradient import count_gradient as _count_gradient
from besa_exp.kernels.masked_weight import masked_weight as _masked_weight
from besa_exp.kernels.obs_columns import obs_columns as _obs_columns
from besa_exp.kernels.rank_in_row import rank_in_row as _rank_in_row

P = ParamSpec("P")
R = TypeVar("R")

HAS_TRITON = importlib.util.find_spec("triton") is not None


def _where_fastest(reference: Callable[P, R]) -> Callable[P, R]:
    """`reference`, or its Triton kernel when the first argument lies on a CUDA device."""

    @functools.wraps(reference)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        if HAS_TRITON and isinstance(first, Tensor) and first.is_cuda:
            kernel = importlib.import_module(f"{reference.__module__}_triton")
            return getattr(kernel, reference.__name__)(*args, **kwargs)
        return reference(*args, **kwargs)

    return op


candidate_gradient = _where_fastest(_candidate_gradient)
count_gradient = _where_fastest(_count_gradient)
masked_weight = _where_fastest(_masked_weight)
obs_columns = _where_fastest(_obs_columns)
rank_in_row = _where_fastest(_rank_in_row)
