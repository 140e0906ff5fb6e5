"""What config.json says of a model after whole parts of it are gone.

Blocks: the count; every list by layer (`layer_types`) loses the entries of the removed blocks; lists of layer numbers
and counts of first layers are renumbered. What depends on a block's place in another way would be shifted silently, so
that every key which speaks of layers and is unknown here is refused. Widths: the number of heads and key-value heads,
`head_dim`, which is always stated then, and the FFN's width under the family's own name.

Some families cannot say fewer heads: their head's width is hidden / heads. Llama can as long as the heads divide the
hidden size; else it is saved as `mistral`, the same arithmetic and the same tensors, whose config asks no such thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from besa_exp.checkpoints.inspect import text_part
from besa_exp.checkpoints.structure import Dimensions, Structure
from besa_exp.errors import ConfigurationError

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
HEADS = ("num_attention_heads", "n_head")
GROUPS = ("num_key_value_heads", "num_kv_heads")
HIDDEN = ("hidden_size", "n_embd")
BY_LAYER = (
    "layer_types",
    "layers_block_type",
    "no_rope_layers",
    "mlp_layer_types",
    "attention_layers",
    "moe_layer_freq",
)
NUMBERS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "kv_layers")
FIRST = ("max_window_layers", "first_k_dense_replace")  # so many first blocks are of another kind
HARMLESS = ("layerdrop",)  # in training alone
MADE_OF = {"no_rope_layer_interval": "no_rope_layers"}  # a list by layer where none is given
# Rules by a block's place, with the value that leaves all blocks alike.
BY_PLACE = {
    "decoder_sparse_step": 1,
    "interleave_moe_layer_step": 1,
    "moe_layer_freq": 1,
    "num_kv_shared_layers": 0,
    "num_nextn_predict_layers": 0,
    "scale_attn_by_inverse_layer_idx": False,
    "per_layer_config": {},
}
SAVED_AS = ("padded", "custom_code")  # blocks of uneven widths: with zeros up to the widest, or with a modelling file
NOT_STREAMED = "structure.shape=uneven: a model that is streamed has blocks of even widths; set model.load=whole"
MODELLING_FILE = "modeling_uneven.py"
BY_BLOCK = ("groups_by_block", "channels_by_block")
CUSTOM = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@dataclass(frozen=True)
class Family:
    """`channels`: the config's name of the FFN's width. Else why channels, or heads, cannot be fewer."""

    channels: str | None = "intermediate_size"
    no_channels: str | None = None
    no_heads: str | None = None


_OF_HIDDEN = "its head size is the hidden size over the number of heads, so its config cannot express fewer heads"
_OVER_ALL = "it norms queries and keys over all heads together, so removing some changes the others"
_EXPERTS = "its FFNs are mixtures of experts, whose channels cannot be removed"
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"), Family()),
    "olmo2": Family(no_heads=_OVER_ALL),
    "stablelm": Family(no_heads=_OF_HIDDEN),
    "gpt_neox": Family(no_heads=_OF_HIDDEN),
    "opt": Family("ffn_dim", no_heads=_OF_HIDDEN),
    "falcon": Family("ffn_hidden_size", no_heads=_OF_HIDDEN),
    "gpt2": Family("n_inner", no_heads=_OF_HIDDEN),
    "bloom": Family(None, "its FFN is always four times the hidden size", _OF_HIDDEN),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"), Family(None, _EXPERTS)),
    "olmoe": Family(None, _EXPERTS, _OVER_ALL),
}


def dimensions_of(config: Mapping[str, Any]) -> Dimensions:
    """Of the dense model. ConfigurationError: it does not say its number of blocks."""
    text = text_part(config)
    hidden, heads = _first(text, HIDDEN) or 0, _first(text, HEADS) or 0
    family = FAMILIES.get(str(text.get("model_type")), Family(None, "unknown", "unknown"))
    channels = text.get(family.channels or "")
    if channels is None and family.channels == "n_inner":
        channels = 4 * hidden
    head_dim = text.get("head_dim") or (hidden // heads if heads else 0)
    blocks = _first(text, COUNTS)
    if not blocks:
        raise ConfigurationError(f"structure: {_kind(text)} names its number of blocks by none of {', '.join(COUNTS)}")
    groups = heads if family.no_heads else _first(text, GROUPS) or heads
    return Dimensions(blocks, hidden, groups, heads, head_dim, channels or 0)


def width_problems(config: Mapping[str, Any], groups: bool, channels: bool) -> list[str]:
    """Why groups of heads, or channels, cannot go, in complete sentences. Known before any weight is read."""
    text = text_part(config)
    family = FAMILIES.get(str(text.get("model_type")))
    if not groups and not channels:
        return []
    if family is None:
        return [
            f"structure: which rows of {_kind(text)} belong to a head or a channel is not known here; remove blocks "
            f"(structure=shortgpt or sleb) or give one of {', '.join(FAMILIES)}"
        ]
    normed = text.get("use_qk_norm") or text.get("qk_layernorm")
    no_heads = family.no_heads or (_OVER_ALL if normed else None)
    found = [f"heads of {_kind(text)} cannot be removed: {no_heads}; keep all groups"] if groups and no_heads else []
    if channels and family.no_channels:
        found.append(f"channels of {_kind(text)} cannot be removed: {family.no_channels}; keep all channels")
    return [f"structure: {problem}" for problem in found]


def uneven_problems(config: Mapping[str, Any]) -> list[str]:
    """Why blocks of this model cannot have other widths than each other."""
    if config.get("model_type") in CUSTOM:
        return []
    return [
        f"structure.shape=uneven: blocks of uneven widths are computed by a modelling file that serves "
        f"{', '.join(CUSTOM)}, not {_kind(config)}; set structure.shape=uniform"
    ]


def block_problems(config: Mapping[str, Any]) -> list[str]:
    """Why blocks of this model cannot go, in complete sentences. Known before any weight is read."""
    text = text_part(config)
    found = []
    if text.get("is_encoder_decoder"):
        found.append(f"structure: {_kind(text)} is an encoder-decoder; give a decoder-only model")
    for key, alike in BY_PLACE.items():
        value = text.get(key)
        if value not in (None, alike) and not isinstance(value, list):
            found.append(
                f"structure: {key}={value} in the config of {_kind(text)} depends on a block's place, which changes "
                "when blocks are removed; keep all blocks"
            )
    listed = (key for key, made in MADE_OF.items() if isinstance(text.get(made), list))
    known = (*COUNTS, *BY_LAYER, *NUMBERS, *FIRST, *HARMLESS, *BY_PLACE, *listed)
    for key, value in text.items():
        if "layer" in key and "norm" not in key and value and key not in known:
            found.append(
                f"structure: {key}={value} in the config of {_kind(text)} may depend on a block's place, which is not "
                "known here; keep all blocks"
            )
    for key in BY_LAYER:
        value, blocks = text.get(key), _first(text, COUNTS)
        if isinstance(value, list) and len(value) != blocks:
            found.append(f"structure: {key} in the config of {_kind(text)} lists {len(value)} of {blocks} blocks")
    return found


def family_problems(
    config: Mapping[str, Any], narrows: bool, uneven: bool = False, streamed: bool = False
) -> list[str]:
    """Why widths (`narrows`; `uneven`: others in each block), or blocks, of this model cannot go, in sentences."""
    if not narrows:
        return block_problems(config)
    problems = width_problems(config, groups=True, channels=True) or (uneven_problems(config) if uneven else [])
    return problems + ([NOT_STREAMED] if uneven and streamed else [])


def narrowed_config(config: Mapping[str, Any], structure: Structure, uneven: bool = False) -> dict[str, Any]:
    """The config of what is left. `uneven`: it states the widest block's widths and lists those of each, for the
    modelling file that goes with it.

    ValueError: the structure is none of this model's, or this config cannot say it."""
    text = dict(text_part(config))
    dimensions = dimensions_of(text)
    problems = structure.problems(dimensions)
    if len(structure.blocks) < dimensions.blocks:
        problems += block_problems(text)
    problems += width_problems(text, structure.groups is not None, structure.channels is not None)
    if not uneven and not structure.is_uniform:
        problems.append(
            "structure: the blocks have uneven widths, which no config can express; set structure.shape=uniform, or "
            "give a method of your own saved_as='padded'"
        )
    if problems:
        raise ValueError(problems[0])
    text |= _fewer_blocks(text, structure) if len(structure.blocks) < dimensions.blocks else {}
    text |= _fewer_heads(text, structure, dimensions) if structure.groups else {}
    if structure.channels:
        text[str(FAMILIES[str(text["model_type"])].channels)] = widest(structure.channels)
    if uneven:
        text |= _by_block(text, structure, dimensions)
    return text if text_part(config) is config else dict(config) | {"text_config": text}


def widest(units: tuple[tuple[int, ...], ...]) -> int:
    return max(map(len, units))


def _fewer_blocks(text: Mapping[str, Any], structure: Structure) -> dict[str, Any]:
    dense = _first(text, COUNTS)
    kept, place = structure.blocks, structure.by_block
    changed: dict[str, Any] = {key: len(kept) for key in COUNTS if text.get(key) is not None}
    for key in BY_LAYER:
        if isinstance(text.get(key), list | tuple):
            changed[key] = [text[key][block] for block in kept]
    for key in NUMBERS:
        if isinstance(text.get(key), list | tuple):
            changed[key] = [place[block] for block in text[key] if block in place]
    for key in FIRST:
        value = text.get(key)
        if isinstance(value, int) and value < (dense or 0):
            changed[key] = sum(block < value for block in kept)
    return changed


def _fewer_heads(text: Mapping[str, Any], structure: Structure, dimensions: Dimensions) -> dict[str, Any]:
    groups = widest(structure.groups or ())
    heads = groups * dimensions.heads_of_group
    changed: dict[str, Any] = {key: heads for key in HEADS if text.get(key) is not None}
    changed |= {key: groups for key in GROUPS if key in text or key == GROUPS[0]}
    changed["head_dim"] = dimensions.head_dim
    if text.get("model_type") == "llama" and dimensions.hidden % heads:
        return changed | _as_mistral(text)
    return changed


def _as_mistral(text: Mapping[str, Any]) -> dict[str, Any]:
    """ValueError: this Llama computes what Mistral's class does not."""
    for key in ("attention_bias", "mlp_bias"):
        if text.get(key):
            raise ValueError(
                f"structure: heads that do not divide the hidden size {text['hidden_size']} are refused by Llama's "
                f"config, and as the equal model_type mistral it cannot be saved with {key}=true; keep a number of "
                "heads that divides it"
            )
    return {"model_type": "mistral", "sliding_window": None, "architectures": ["MistralForCausalLM"]}


def modelling_code(model_type: str) -> str:
    """The modelling file of a family's models with blocks of uneven widths."""
    text = Path(__file__).with_name("uneven_llama.py").read_text(encoding="utf-8")
    return text.replace("Llama", CUSTOM[model_type])


def even_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model with blocks of uneven widths the config of the one that is padded to the widest."""
    return {key: value for key, value in config.items() if key not in (*BY_BLOCK, "auto_map", "architectures")}


def _by_block(text: Mapping[str, Any], structure: Structure, dimensions: Dimensions) -> dict[str, Any]:
    """What `uneven_llama.py` reads. ValueError: a family that it does not serve."""
    if problems := uneven_problems(text):
        raise ValueError(problems[0])
    architecture = f"Uneven{CUSTOM[str(text['model_type'])]}ForCausalLM"
    blocks = structure.blocks
    return {
        BY_BLOCK[0]: [len(structure.kept_groups(block, dimensions)) for block in blocks],
        BY_BLOCK[1]: [len(structure.kept_channels(block, dimensions)) for block in blocks],
        "architectures": [architecture],
        "auto_map": {"AutoModelForCausalLM": f"{MODELLING_FILE.removesuffix('.py')}.{architecture}"},
    }


def _first(text: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((text[key] for key in keys if text.get(key)), None)


def _kind(text: Mapping[str, Any]) -> str:
    return str(text.get("model_type") or "this model")
