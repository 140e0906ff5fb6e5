"""A model dealt out to the processes that torchrun started, by PyTorch's FSDP2 (`fully_shard`), a block at a time.

Each process holds its rows of every tensor, and of what is trained with it: masters, moments and masks. The tensors of
a block come together just before it is computed and go afterwards; their gradients are summed over the processes and
each keeps its rows. So what full tuning holds beside a model is divided by the number of processes; a step sends every
weight twice, and every gradient once.

The kept values of a tensor lie in the order of its rows. Those of all processes end to end are those of the whole
tensor: checkpoints hold whole tensors.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from besa_exp.blocks.block import discover_blocks
from besa_exp.machine import distributed
from besa_exp.tensors.keep_bits import KeepBits


def sharded(model: nn.Module) -> nn.Module:
    """A twin of the model that is dealt out; the model itself stays as it is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    twin = copy.deepcopy(model, {id(own): nn.Parameter(own.detach()) for own in model.parameters()})
    mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.num_ranks(),))
    for part in (*discover_blocks(twin)[1], twin):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    return twin


@torch.no_grad()
def take_back(model: nn.Module, twin: nn.Module) -> None:
    """Give the model the weights of its twin."""
    for name, parameter in twin.named_parameters():
        model.get_parameter(name).copy_(whole(parameter))


def is_dealt_out(parameter: Tensor) -> bool:
    """Whether it is a DTensor, whose module alone takes half a second to import."""
    return hasattr(parameter, "full_tensor")


def own(parameter: Any) -> Tensor:
    """The rows of this process, which change with it; all of a parameter that is not dealt out."""
    return parameter.to_local() if is_dealt_out(parameter) else parameter


def whole(parameter: Any) -> Tensor:
    """All rows."""
    return parameter.full_tensor() if is_dealt_out(parameter) else parameter


def own_rows(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Of a whole tensor the rows that this process has of the parameter."""
    if not is_dealt_out(parameter):
        return tensor
    parts = tensor.chunk(distributed.num_ranks())
    return parts[distributed.rank()] if distributed.rank() < len(parts) else tensor[:0]


def own_keep(keep: KeepBits | None, parameter: Tensor) -> KeepBits | None:
    """What is kept of these rows."""
    if keep is None or not is_dealt_out(parameter):
        return keep
    return KeepBits.of(own_rows(keep.mask(), parameter))
