"""Reasons in a checkpoint's config.json why it cannot be pruned, found before any weight is read and without torch.

Refused: encoder-decoders, quantised weights, adapters, and models that need code of their own as long as
`model.trust_remote_code` is false. Each problem says what was found, the rule and the remedy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

QUANTISED_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8", "I16", "I32")  # of weights, in safetensors


def config_problems(config: Mapping[str, Any], where: str, trust_remote_code: bool) -> list[str]:
    """What speaks against the model, in complete sentences that begin with `where`."""
    problems = []
    if config.get("is_encoder_decoder"):
        problems.append(
            f"{where}: {_kind(config)} is an encoder-decoder (is_encoder_decoder in its config.json); give a "
            "decoder-only model"
        )
    quantisation = config.get("quantization_config") or text_part(config).get("quantization_config")
    if quantisation:
        named = quantisation if isinstance(quantisation, Mapping) else {"format": quantisation}
        method = named.get("quant_method") or named.get("format") or "an unnamed method"
        problems.append(
            f"{where}: its weights are quantised ({method}, by quantization_config in its config.json); {_UNQUANTISED}"
        )
    code = code_of(config)
    if code and not trust_remote_code and not known_to_transformers(str(config.get("model_type"))):
        problems.append(
            f"{where}: transformers has no {_kind(config)}, and model.trust_remote_code=false forbids the code that "
            f"comes with the model; it would run {', '.join(code)}: read these files, then set "
            "model.trust_remote_code=true"
        )
    return problems


_UNQUANTISED = "pruning needs plain weights: give the unquantised model that it was made from"


def quantised_tensors(tensors: Mapping[str, Any], where: str) -> list[str]:
    """The problem of matrices in blocks that are saved as integers or in 8 bits. `tensors`: safetensors headers."""
    odd = [name for name, tensor in tensors.items() if tensor["dtype"] in QUANTISED_DTYPES and len(tensor["shape"]) > 1]
    if not odd:
        return []
    dtype = tensors[odd[0]]["dtype"]
    return [f"{where}: its weights are quantised ({odd[0]} is saved as {dtype}); {_UNQUANTISED}"]


def adapter_problem(adapter: Mapping[str, Any], where: str) -> str:
    """Of a folder that holds an adapter in the place of a model; `adapter` is its adapter_config.json."""
    kind = adapter.get("peft_type", "of no named type")
    base = adapter.get("base_model_name_or_path") or "an unnamed model"
    return (
        f"{where}: holds an adapter ({kind}, of {base}) and no model; merge it first, with peft's merge_and_unload() "
        "and save_pretrained(folder), and give that folder"
    )


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's part of a multimodal model's config; the whole config where there is no such part."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def code_of(config: Mapping[str, Any]) -> list[str]:
    """The files and classes that a config's auto_map names, as `modeling_x.py (XForCausalLM)`. A name before `--` is
    another repository that they are fetched from."""
    named, places = [], config.get("auto_map")
    for value in places.values() if isinstance(places, Mapping) else ():
        for reference in value if isinstance(value, list) else [value]:
            repository, _, place = str(reference).rpartition("--")
            module, _, name = place.rpartition(".")
            if module:
                named.append(f"{module}.py ({name})" + (f" of {repository}" if repository else ""))
    return list(dict.fromkeys(named))


def known_to_transformers(model_type: str) -> bool:
    """Whether the installed transformers has classes of its own for a model type. Its lists are read as text: importing
    them takes seconds."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    lists = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    return f'("{model_type}",' in lists.read_text(encoding="utf-8")


def _kind(config: Mapping[str, Any]) -> str:
    return ", ".join(config.get("architectures") or []) or str(config.get("model_type") or "such a model")
