"""What a run writes of a model: a plain Hugging Face folder with exact zeros, and the kept weights as one bit each.

Sparse checkpoint formats were removed upstream, so the folder holds dense tensors and no sparsity_config: it loads
wherever the dense model does. Equal content is equal bytes; a folder or file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa_exp.checkpoints.narrowed_config import BY_BLOCK, MODELLING_FILE, modelling_code
from besa_exp.checkpoints.shards import write_joined
from besa_exp.checkpoints.tensor_sources import stored_tensors
from besa_exp.errors import ConfigurationError, RunError
from besa_exp.machine import atomic
from besa_exp.tensors.keep_bits import packed_bits, unpacked

SHARD_SIZE = "5GB"
BESIDE_WEIGHTS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken")
BESIDE_WEIGHTS += ("chat_template*", "LICENSE*", "NOTICE*", "USE_POLICY*")
MASKS_KEY = "besa_masks"  # one key only: safetensors orders several at random
MASKS_VERSION = 2


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    card: str,
    sources: Path | None = None,
    shard_size: str = SHARD_SIZE,
) -> None:
    """Writes config, safetensors shards, tokenizer, generation config and `card` as README.md; replaces `folder`.

    Tied weights stay tied, the config's dtype becomes the weights'. From `sources`, the dense model's folder, come
    tokenizer and licence files that the libraries did not write. Raises RunError, and leaves an older `folder` then."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise RunError(f"{folder}: a quantised model cannot be saved as plain weights; prune the unquantised one")
    told = atomic.writing(f"{folder} could not be written", "free disk space or set save.model=false")
    with told, atomic.replaced_folder(folder) as partial:
        model.save_pretrained(partial, max_shard_size=shard_size)
        save_beside_weights(model, tokenizer, partial, card, sources)


def check_savable(model: PreTrainedModel, path: str) -> None:
    """ConfigurationError, before any long work: transformers has read the model's configs and refuses to save them."""
    try:
        with tempfile.TemporaryDirectory(prefix="besa-") as folder:
            model.config.save_pretrained(folder)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
    except Exception as error:  # of a type of its own in each library
        raise ConfigurationError(
            f"model.path={path}: its config cannot be saved again, so that what is pruned could not be kept "
            f"({' '.join(str(error).split())}); correct config.json or generation_config.json there"
        ) from error


def save_beside_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, card: str, sources: Path | None
) -> None:
    """All that a model folder holds besides weights: configs, tokenizer, licence, `card` as README.md, and the
    modelling file where blocks have uneven widths."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "sparsity_config")}
    if BY_BLOCK[0] in plain:
        plain["architectures"] = [plain["auto_map"]["AutoModelForCausalLM"].rpartition(".")[2]]
        (folder / MODELLING_FILE).write_text(modelling_code(plain["model_type"]), encoding="utf-8")
    path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in (file for pattern in BESIDE_WEIGHTS if sources for file in sources.glob(pattern)):
        if file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_card(folder: Path, card: str) -> None:
    """Replaces the README.md of a saved model: scores are known only after the saved model has been evaluated."""
    atomic.write_text(folder / "README.md", card)


def save_masks(
    keep_masks: Mapping[str, Bool[Tensor, "out in"]],
    path: Path,
    dense_sha256: str | None = None,
    weights_updated: bool = False,
    permutations: Mapping[str, Int[Tensor, " in"]] | None = None,
) -> None:
    """keep_mask of each linear by its full name, one bit a weight: row-major, highest bit first, 1 = kept. Beside it,
    as `NAME.permutation` in int32, the order of inputs in which it is N:M, where that is not their own.

    `dense_sha256` (see `weights_sha256`) names the dense weights that the masks belong to; `weights_updated`: kept
    weights were changed too, so that dense weights and masks do not give the pruned ones."""
    names = sorted(keep_masks)
    packed = {name: packed_bits(keep_masks[name]).cpu() for name in names}
    shapes = {name: list(keep_masks[name].shape) for name in names}
    packed |= {f"{name}.permutation": order.to("cpu", torch.int32) for name, order in (permutations or {}).items()}
    description = {"shapes": shapes, "dense_sha256": dense_sha256, "weights_updated": weights_updated}
    _write_masks(path, description, lambda partial, text: save_file(packed, partial, text))


def _write_masks(path: Path, description: Mapping[str, Any], write: Callable[[Path, dict[str, str]], None]) -> None:
    text = json.dumps({"format_version": MASKS_VERSION, **description}, sort_keys=True)
    told = atomic.writing(f"{path} could not be written", "free disk space or set save.masks=false")
    with told, atomic.replaced_file(path) as partial:
        write(partial, {MASKS_KEY: text})


def merge_masks(files: Sequence[Path], path: Path, origin: Mapping[str, Any]) -> None:
    """The blocks' masks files, in order, as one, which also says `origin`: what the masks were made from and how."""
    described = [masks_description(file) for file in files]
    of_blocks = {
        "shapes": {name: shape for description in described for name, shape in description["shapes"].items()},
        "dense_sha256": [description["dense_sha256"] for description in described],
        "weights_updated": any(description["weights_updated"] for description in described),
    }
    _write_masks(path, {**of_blocks, **origin}, lambda partial, text: write_joined(files, partial, text))


def load_masks(path: Path) -> dict[str, Bool[Tensor, "out in"]]:
    """The keep_masks that `save_masks` wrote. Raises ConfigurationError when `path` is no such file."""
    return read_masks(path, masks_description(path)["shapes"])


def read_masks(path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Bool[Tensor, "out in"]]:
    """The keep_masks of these names and shapes alone."""
    with safe_open(path, framework="pt") as file:
        return {name: unpacked(file.get_tensor(name), torch.Size(shape)) for name, shape in shapes.items()}


def masks_description(path: Path) -> dict[str, Any]:
    """`format_version`, `shapes` {name: [out, in]}, `dense_sha256`, `weights_updated` of a masks file; of a run's also
    `dense_sha256` as a list by block, and what `merge_masks` was given of their origin."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(MASKS_KEY)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{path} cannot be read as masks ({error}); give a run's masks.safetensors") from error
    description = json.loads(text) if text else {}
    if description.get("format_version") != MASKS_VERSION:
        raise ConfigurationError(
            f"{path} holds no masks of format {MASKS_VERSION}; give the masks.safetensors of a run of this version"
        )
    return description


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """One hash over names, dtypes, shapes and bytes, whatever the order of `weights`."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def count_zeros(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(weights, zeros) of each named tensor of a model folder, counted in its files one tensor at a time."""
    stored, counts = stored_tensors(folder), {}
    for name in names:
        with safe_open(stored[name].file, framework="pt") as file:
            weight = file.get_tensor(name)
        counts[name] = (weight.numel(), weight.numel() - int(torch.count_nonzero(weight)))
    return counts
