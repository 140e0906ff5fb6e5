"""A structure applied to a model in memory, or to a model folder that is read and written block by block.

The narrowed model is transformers' own class built from the narrowed config, so that it saves, loads, generates and
numbers its layers as any other. Before any weight moves two things are compared without data: that the tensors have
the shapes which that class asks for, and that each kept block is still of the same kind as it was in its old place (a
local attention that became a global one would load in silence).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from besa_exp.blocks.block import discover_blocks
from besa_exp.checkpoints import uneven_llama
from besa_exp.checkpoints.files import save_beside_weights
from besa_exp.checkpoints.narrowed_config import BY_BLOCK, dimensions_of, even_config, narrowed_config
from besa_exp.checkpoints.narrowed_tensors import Narrowing, costs_of
from besa_exp.checkpoints.shards import streamed_layout, write_index, write_shards
from besa_exp.checkpoints.streaming import StreamedWeights, open_streamed
from besa_exp.checkpoints.structure import Costs, Dimensions, Structure, to_json
from besa_exp.checkpoints.tensor_sources import as_saved
from besa_exp.machine import atomic

STRUCTURE_FILE = "structure.json"
PLACE = ("layer_idx", "layer_id", "layer_number", "block_idx")  # names of the number that a block has


def dimensions_of_model(model: PreTrainedModel) -> Dimensions:
    """As its config has them."""
    return dimensions_of(model.config.to_dict())


def costs_of_model(model: PreTrainedModel) -> Costs:
    """What each part of the dense model costs; its weights may be absent (meta)."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return costs_of(shapes, dimensions_of_model(model), discover_blocks(model)[0])


def narrowed_model(model: PreTrainedModel, structure: Structure, uneven: bool = False) -> PreTrainedModel:
    """What is left, as a model of its own on the same device, frozen and in evaluation mode; blocks may be `uneven`.
    Tensors that stay whole are shared with `model`, which is not changed. ValueError: it cannot be narrowed so."""
    target = _empty(model, structure, uneven)
    narrowing = _narrowing(model, structure)
    made = narrowing.narrowed(model.state_dict())
    target.load_state_dict({name: made[name] for name in target.state_dict()}, assign=True)
    buffers = {narrowing.new_name(name): buffer for name, buffer in model.named_buffers()}
    _take_buffers(target, {name: buffer for name, buffer in buffers.items() if name and name not in made})
    target.tie_weights()
    return target.eval().requires_grad_(False)


def padded_model(model: PreTrainedModel) -> PreTrainedModel:
    """Of a model with blocks of uneven widths the ordinary one of its family that computes the same: each block ends
    with rows and columns of zeros, up to the widest. Of another model itself."""
    if not hasattr(model.config, BY_BLOCK[0]):
        return model
    config = type(model.config).from_dict(even_config(model.config.to_dict()))
    config._attn_implementation = model.config._attn_implementation
    with init_empty_weights():
        target = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    target.generation_config = deepcopy(model.generation_config)
    wanted, made = target.state_dict(), {}
    for name, tensor in model.state_dict().items():
        ends = [(0, size - now) for size, now in zip(wanted[name].shape, tensor.shape, strict=True)]
        made[name] = nn.functional.pad(tensor, [pad for end in reversed(ends) for pad in end])
    target.load_state_dict(made, assign=True)
    _take_buffers(target, dict(model.named_buffers()))
    target.tie_weights()
    return target.eval().requires_grad_(False)


def _take_buffers(target: PreTrainedModel, buffers: Mapping[str, Tensor]) -> None:
    """Those that no file holds, such as rotary tables, where `target` has them: its blocks may be of one kind alone."""
    for name, _ in list(target.named_buffers(remove_duplicate=False)):
        if name in buffers:
            owner, _, own = name.rpartition(".")
            target.get_submodule(owner)._buffers[own] = buffers[name]


def narrow_folder(
    folder: Path,
    structure: Structure,
    out: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Writes what is left of the model in `folder` to `out`, one shard for what is outside the blocks and one for each
    kept block, read one at a time; structure.json beside them. Replaces `out`, whole or not at all.

    ValueError: this model cannot be narrowed so, or not read block by block (`narrowed_model` can from memory)."""
    model, weights = open_streamed(folder, "auto", torch.device("cpu"), trust_remote_code)
    target = _empty(model, structure)
    narrowing = _narrowing(model, structure)
    path = narrowing.path
    wanted = target.state_dict()
    outside = {name: tensor for name, tensor in wanted.items() if name in weights.sources and not _in(name, path)}
    blocks = [
        as_saved(model, {name: tensor for name, tensor in wanted.items() if _in(name, f"{path}.{place}")})
        for place in range(len(structure.blocks))
    ]
    with atomic.replaced_folder(out) as partial:
        layout = streamed_layout(as_saved(model, outside), blocks)
        write_shards(partial, layout, _parts(model, weights, narrowing, {*outside}))
        write_index(partial, layout, target.num_parameters())
        save_beside_weights(target, tokenizer, partial, "", folder)
        (partial / STRUCTURE_FILE).write_text(to_json(structure, dimensions_of_model(model)), encoding="utf-8")


def _parts(
    model: PreTrainedModel, weights: StreamedWeights, narrowing: Narrowing, outside: set[str]
) -> Iterator[Mapping[str, Tensor]]:
    read = weights.read_outside(f"{narrowing.path}.")
    yield as_saved(model, {name: tensor for name, tensor in read.items() if name in outside})
    for block in narrowing.structure.blocks:
        yield as_saved(model, narrowing.narrowed(weights.read(f"{narrowing.path}.{block}.")))


def _narrowing(model: PreTrainedModel, structure: Structure) -> Narrowing:
    return Narrowing(structure, dimensions_of_model(model), discover_blocks(model)[0])


def _empty(model: PreTrainedModel, structure: Structure, uneven: bool = False) -> PreTrainedModel:
    """The narrowed model without weights. ValueError: it is not what the narrowed tensors make up."""
    config = model_config(model.config, structure, uneven)
    with init_empty_weights():
        target = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
        if uneven:
            uneven_llama.resize_blocks(target, config)
    if model.generation_config is not None:
        target.generation_config = deepcopy(model.generation_config)
    target.eval()
    _check_shapes(model, target, structure)
    _check_kinds(model, target, structure)
    return target


def model_config(config: PreTrainedConfig, structure: Structure, uneven: bool) -> PreTrainedConfig:
    """As `narrowed_config`, of transformers' value."""
    values = narrowed_config(config.to_dict(), structure, uneven)
    kind = values.pop("model_type")
    made = type(config).from_dict(values) if kind == config.model_type else AutoConfig.for_model(kind, **values)
    made._attn_implementation = config._attn_implementation
    return made


def _check_shapes(model: PreTrainedModel, target: PreTrainedModel, structure: Structure) -> None:
    shapes = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    made = {name: tuple(t.shape) for name, t in _narrowing(model, structure).narrowed(shapes).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in target.state_dict().items()}
    for name in sorted(made.keys() | wanted.keys()):
        if made.get(name) != wanted.get(name):
            raise ValueError(
                f"structure: {type(target).__name__} of the narrowed config asks for {name} {wanted.get(name)}, what "
                f"is left is {made.get(name)}: which of its rows belong to a head or channel is not known here; keep "
                "all groups and channels"
            )


def _check_kinds(model: PreTrainedModel, target: PreTrainedModel, structure: Structure) -> None:
    """Each kept block's modules are of the classes that they were and, where no width changed, with the same settings
    but for their number."""
    old, new = discover_blocks(model)[1], discover_blocks(target)[1]
    sized = structure.groups is not None or structure.channels is not None
    for place, block in enumerate(structure.blocks):
        was, becomes = (dict(modules.named_modules()) for modules in (old[block], new[place]))
        for path in was.keys() | becomes.keys():
            if changed := _changed(was.get(path), becomes.get(path), sized):
                raise ValueError(
                    f"structure: block {block} would become another kind of block in place {place}: "
                    f"{path or 'it'} {changed}; keep all blocks before it, or state layer_types in its config.json"
                )


def _changed(was: nn.Module | None, becomes: nn.Module | None, sized: bool) -> str | None:
    """What of a module's settings differs. Numbers follow widths."""
    if was is None or becomes is None:
        return "is there in one of them alone"
    old, new = (
        {key: value for key, value in vars(one).items() if _is_setting(key, value, sized)} for one in (was, becomes)
    )
    different = (key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return next((f"has {key}={new.get(key)}, which was {old.get(key)}" for key in different), None)


def _is_setting(key: str, value: Any, sized: bool) -> bool:
    if key in PLACE or (key.startswith("_") and key != "_sliding_window"):
        return False
    return isinstance(value, bool | str | float | None) or (isinstance(value, int) and not sized)


def _in(name: str, prefix: str) -> bool:
    return name.startswith(f"{prefix}.")
