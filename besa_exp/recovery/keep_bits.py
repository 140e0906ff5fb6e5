"""Which weights of a model are kept: the bits of each parameter that holds linears of a block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from besa_exp.blocks.block import discover_blocks
from besa_exp.blocks.linears import Linear, find_linears
from besa_exp.tensors.keep_bits import KeepBits


def keep_of_zeros(model: nn.Module) -> dict[str, KeepBits]:
    """The bits of each parameter that holds linears of a block and some zeros, by the parameter's name: its zeros are
    what was pruned. Parameters without a zero are dense and not named."""
    kept = {}
    for name, parameter in parameters_of_linears(model).items():
        bits = KeepBits.of(parameter.detach() != 0)
        if bits.count < bits.numel:
            kept[name] = bits
    return kept


def keep_of_masks(
    model: nn.Module, keep_masks: Mapping[str, Bool[Tensor, "_out _in"]], device: torch.device | None = None
) -> dict[str, KeepBits]:
    """The bits of each parameter by its name, from the keep masks of linears by their full name (`load_masks`), such as
    `model.layers.0.mlp.experts.3.down_proj.weight`. `device`: where blocks that lie in files compute. ValueError: a
    mask fits no linear of the model."""
    path, modules = discover_blocks(model)
    masks, left = {}, dict(keep_masks)
    for index, module in enumerate(modules):
        for name, linear in find_linears(module).items():
            mask = left.pop(f"{path}.{index}.{name}.weight", None)
            if mask is None:
                continue
            own = f"{path}.{index}.{linear.path}"
            shape = module.get_parameter(linear.path).shape
            part = linear.part_of(masks.setdefault(own, torch.ones(shape, dtype=torch.bool)))
            if mask.shape != part.shape:
                raise ValueError(
                    f"{own}: the mask has the shape {list(mask.shape)} where the weight has {list(part.shape)}; give "
                    "the masks of the run that pruned this model"
                )
            part.copy_(mask)
    if left:
        raise ValueError(
            f"masks of {', '.join(sorted(left)[:3])} fit no linear of {type(model).__name__}; give the masks of the "
            "run that pruned this model"
        )
    places = {name: parameter.device for name, parameter in model.named_parameters()}
    devices = {name: device if device and place.type == "meta" else place for name, place in places.items()}
    return {name: KeepBits.of(mask.to(devices[name])) for name, mask in masks.items()}


def masks_of_keep(
    name: str, linears: Mapping[str, Linear], keep: Mapping[str, KeepBits]
) -> dict[str, Bool[Tensor, "_out _in"]]:
    """The inverse of `keep_of_masks` for the linears of the block of this name; all is kept where nothing is said."""
    masks = {}
    for own, linear in linears.items():
        bits = keep.get(f"{name}.{linear.path}")
        all_kept = torch.ones(linear.weight.shape, dtype=torch.bool)
        masks[f"{name}.{own}.weight"] = linear.part_of(bits.mask()) if bits else all_kept
    return masks


def sparsity_of(model: nn.Module, keep: Mapping[str, KeepBits]) -> float:
    """The fraction of the weights of the blocks' linears that is pruned."""
    weights = sum(parameter.numel() for parameter in parameters_of_linears(model).values())
    return sum(bits.numel - bits.count for bits in keep.values()) / max(weights, 1)


def parameters_of_linears(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that hold linears of blocks, by their name in the model; a stack of experts is one."""
    path, modules = discover_blocks(model)
    return {
        f"{path}.{index}.{linear.path}": module.get_parameter(linear.path)
        for index, module in enumerate(modules)
        for linear in find_linears(module).values()
    }
