"""Measured speed of 2:4 weights: the dense product against the semi-structured one, for each kind of linear.

`torch.sparse.to_sparse_semi_structured` packs a weight in which two of every four consecutive inputs are zero; devices
from compute capability 8.0 on multiply it in hardware, in half precision. Timed is `linear(hidden, weight)` for
`TOKENS` tokens at once, each way, on the device where the model lies. Everywhere else this is n/a, with the reason.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from besa_exp.blocks.sparsity_table import linear_type
from besa_exp.errors import Unavailable

if TYPE_CHECKING:
    from besa_exp.checkpoints.load import LoadedModel

TOKENS = 2048
REPEATS, WARM_UP = 20, 5
CAPABILITY = (8, 0)
HALVES = (torch.float16, torch.bfloat16)


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Unavailable: this device has no semi-structured products, or not for this dtype."""
    if device.type != "cuda":
        raise Unavailable(f"the device is {device.type}; 2:4 products need a CUDA device of compute capability 8.0")
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise Unavailable(f"compute capability {found[0]}.{found[1]}; 2:4 products need 8.0")
    if dtype not in HALVES:
        raise Unavailable(f"the weights are {str(dtype).removeprefix('torch.')}; set model.dtype=bfloat16 or float16")


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four consecutive inputs of a row [out in] are not zero."""
    return weight.shape[1] % 4 == 0 and bool((weight.reshape(-1, 4) != 0).sum(dim=1).le(2).all())


@torch.no_grad()
def measure_model(loaded: LoadedModel) -> dict[str, Any]:
    """`linears`: by linear type, of the first one, `dense_seconds` and `sparse_seconds` (medians over REPEATS) and
    `speed_up`, their quotient; `device` and `tokens` say where and of what. Unavailable: it cannot be measured here."""
    device = next(loaded.model.get_input_embeddings().parameters()).device
    check_device(device, loaded.model.dtype)
    linears: dict[str, dict[str, float]] = {}
    for block in loaded.resident(loaded.blocks()[:1]):
        for name, linear in block.linears.items():
            weight = linear.weight
            if not is_two_of_four(weight):
                raise Unavailable(f"{block.name}.{name} is not 2:4; prune with pattern=2:4, without pruner.permute")
            if linear_type(name) not in linears:
                linears[linear_type(name)] = _measured(weight.contiguous(), f"{block.name}.{name}")
    return {"device": torch.cuda.get_device_name(device), "tokens": TOKENS, "linears": linears}


def _measured(weight: Tensor, name: str) -> dict[str, float]:
    hidden = torch.randn(TOKENS, weight.shape[1], device=weight.device, dtype=weight.dtype)
    try:
        packed = torch.sparse.to_sparse_semi_structured(weight)
        dense, sparse = _seconds(hidden, weight), _seconds(hidden, packed)
    except RuntimeError as error:  # shapes that the hardware does not take
        raise Unavailable(f"{name} {list(weight.shape)}: {str(error).splitlines()[0]}") from error
    return {"dense_seconds": dense, "sparse_seconds": sparse, "speed_up": dense / sparse}


def _seconds(hidden: Tensor, weight: Tensor) -> float:
    """The median time of one product."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.nn.functional.linear(hidden, weight)
        end.record()
        torch.cuda.synchronize(hidden.device)
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[WARM_UP:])
