"""Whether a model object is one that can be changed in place, asked before any long work."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from besa_exp.blocks.block import discover_blocks
from besa_exp.blocks.linears import find_linears

PLAIN = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # dtypes of weights that can be pruned
WRAPPED = ("module", "_orig_mod")  # where DataParallel and torch.compile keep the model
MERGE = "merge it first, and give what its merge_and_unload() returns"
MAKE_PARAMETER = "make it a parameter, by torch.nn.utils.prune.remove or parametrize.remove_parametrizations"


def check_model(model: Any) -> list[str]:
    """Why it is not a model that can be changed in place, in a complete sentence."""
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    classes = [cls.__name__ for cls in type(model).__mro__]
    if isinstance(model, PreTrainedModel) and any(name in names or name.endswith("ForCausalLM") for name in classes):
        return _not_writable(model) or _not_its_own(model)
    if hasattr(model, "merge_and_unload"):
        return [f"{type(model).__name__} holds an adapter; {MERGE}"]
    inside = next((name for name in WRAPPED if isinstance(getattr(model, name, None), PreTrainedModel)), None)
    return [
        f"{type(model).__name__} is no causal language model of transformers; give what "
        + (f"it wraps, its .{inside}" if inside else "AutoModelForCausalLM.from_pretrained(...) returns")
        + ", or the path of a model"
    ]


def _not_writable(model: PreTrainedModel) -> list[str]:
    """Parameters that no number can be written into; of each kind the first, with the remedy."""
    found: dict[str, str] = {}  # what is wrong: with which
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            remedy = "load the model without device_map and low memory options, or give its path and out="
            found.setdefault(f"is not in memory (a meta tensor); {remedy}", name)
        elif parameter.is_inference():
            found.setdefault("was made within torch.inference_mode, where nothing changes it; load it outside", name)
        elif parameter.dim() > 1 and parameter.dtype not in PLAIN:
            found.setdefault(f"is quantised ({parameter.dtype}); give the unquantised model", name)
    return [f"{name} {told}" for told, name in found.items()]


def _not_its_own(model: PreTrainedModel) -> list[str]:
    """Weights in the blocks that are no parameters of one module alone, so that what is written there is lost, or
    changed elsewhere too; of each kind the first, with the remedy."""
    path, blocks = discover_blocks(model)
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if name.startswith(f"{path}.") and hasattr(module, "base_layer"):
            found.setdefault(f"holds an adapter; {MERGE}", name)
    for index, block in enumerate(blocks):
        for name, linear in find_linears(block).items():
            if linear.path.rpartition(".")[2] not in linear.module._parameters:
                told = f"is computed from other tensors in each pass; {MAKE_PARAMETER}"
                found.setdefault(told, f"{path}.{index}.{name}")
    if others := _shared(model, path):
        found[f"is {others[1]} too, one tensor at two places; give each a clone of its own"] = others[0]
    return [f"{name} {told}" for told, name in found.items()]


def _shared(model: PreTrainedModel, path: str) -> list[str]:
    """The names of the first parameter that has several, one of them in the blocks; none: there is no such one."""
    held: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held.setdefault(id(parameter), []).append(name)
    several = (names for names in held.values() if len(names) > 1)
    return next((names for names in several if any(name.startswith(f"{path}.") for name in names)), [])
