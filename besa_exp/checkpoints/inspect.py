"""What a folder says about its model before any weight is read: config.json and the headers of the safetensors files.

A safetensors file is 8 bytes (the header's length, little-endian), the header (JSON: name to dtype, shape and
data_offsets), then the data. A file that was cut off is shorter than its own header says.

A config speaks against encoder-decoders, quantised weights, adapters, and models that need code of their own as long as
`model.trust_remote_code` is false. Each problem says what was found, the rule and the remedy.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from besa_exp.machine import atomic

CACHED = "models--"  # begins the hub cache's folders of models
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")  # of a config, first found
INDEX = "model.safetensors.index.json"
CONV1D = ("gpt2", "openai-gpt")  # model types that save their linears as [in, out]
QUANTISED_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8", "I16", "I32")  # of weights, in safetensors
UNQUANTISED = "pruning needs plain weights: give the unquantised model that it was made from"
IN_A_BLOCK = re.compile(r"\.\d+\.(?:.+\.)?\w+\.weight$")  # model.layers.3.mlp.down_proj.weight
BLOCK_AND_LINEAR = re.compile(r"\.(\d+)\.(.+)\.weight$")


@dataclass(frozen=True)
class ModelFolder:
    """`context`: longest window in tokens, None where the config does not say. `linears`: name to [out, in] of the
    two-dimensional weights inside blocks. `weights`: count over all tensors. `saved_bytes`: their size as saved.
    `to_convert`: they are converted to safetensors first. Of pickled ones, which are not read before, the linears
    are unknown and the count a guess."""

    context: int | None
    linears: dict[str, tuple[int, int]]
    weights: int
    saved_bytes: int
    to_convert: bool = False


def inspect_model_folder(
    folder: Path, key: str = "model.path", convert: bool = False, trust_remote_code: bool = False
) -> tuple[ModelFolder | None, list[str]]:
    """The facts, or the problems that make the folder unusable; `key` is what a person set to name it. `convert`:
    pickled weights are no problem."""
    where = f"{key}={folder}"
    config, problems = inspect_config(folder, where, trust_remote_code)
    if problems:
        return None, problems
    safe = (folder / "model.safetensors").is_file() or (folder / INDEX).is_file()
    pickles, problem = pickled_files(folder) if convert and not safe else ([], None)
    if problem:
        return None, [problem]
    if pickles:
        missing = [file.name for file in pickles if not file.is_file()]
        if missing:
            return None, [f"{where}: {', '.join(missing)} missing, which its index names; copy them too"]
        return _pickled_facts(config, sum(file.stat().st_size for file in pickles)), []
    files, problems = weight_files(folder, where)
    tensors: dict[str, Any] = {}
    for file in files:
        header, problem = read_header(file)
        if both := sorted(tensors.keys() & header.keys()):
            problem = f"{where}: {both[0]} is held by {file.name} and by another file too; keep the one that is meant"
        problems += [problem] if problem else []
        tensors |= header
    problems = problems or quantised_tensors(tensors, where)
    return (None, problems) if problems else (_facts(config, tensors), [])


def inspect_config(folder: Path, where: str, trust_remote_code: bool) -> tuple[dict[str, Any], list[str]]:
    """config.json, and what it says against the model."""
    files = [file for name in ("config.json", "adapter_config.json") if (file := folder / name).is_file()]
    if not files:
        return {}, [_only_gguf(folder, where) or f"{where}: {_no_model(folder)}"]
    try:
        config = json.loads(files[0].read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no keys")
    except (OSError, ValueError) as error:
        return {}, [f"{files[0]}: cannot be read as JSON ({error}); copy the model folder again"]
    if files[0].name == "adapter_config.json":
        return {}, [adapter_problem(config, where)]
    return config, config_problems(config, where, trust_remote_code)


def _no_model(folder: Path) -> str:
    """What a folder without a config.json is, and what to give instead."""
    if folder.name.startswith(CACHED) and (folder / "snapshots").is_dir():
        name = folder.name.removeprefix(CACHED).replace("--", "/")
        return f"is the hub cache's folder of {name}, not a model's; give the hub id {name}, which finds it there"
    held = sorted(path.name.removeprefix(CACHED) for path in folder.iterdir() if path.name.startswith(CACHED))
    if held:
        return f"is a cache of the hub, not a model's folder; give a hub id, as {held[0].replace('--', '/')}"
    return "no config.json in it; give the folder that save_pretrained wrote"


def pickled_files(folder: Path) -> tuple[list[Path], str | None]:
    """The .bin files that make up the model: those of their index, or the only one; or that the index is none."""
    index, only = folder / "pytorch_model.bin.index.json", folder / "pytorch_model.bin"
    names, problem = _names_in(index) if index.is_file() else ([only.name] * only.is_file(), None)
    return [folder / name for name in names], problem


def only_pickled(where: str, file: str) -> str:
    """The problem of a model without safetensors."""
    return (
        f"{where}: only pickled weights ({file}), which can run code when they are read; model.convert=true reads "
        "tensors alone from .bin files and writes safetensors into outputs/converted; or load it once where you trust "
        "it and write it with save_pretrained(folder)"
    )


def saved_dtype(folder: Path) -> str | None:
    """The dtype that config.json gives the weights; None: it gives none, or cannot be read."""
    config = atomic.read_json(folder / "config.json") or {}
    return config.get("dtype") or config.get("torch_dtype")


def read_header(file: Path) -> tuple[dict[str, Any], str | None]:
    """A safetensors file's header, {tensor: {dtype, shape, data_offsets}}, or the problem that makes it unreadable."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            return {}, f"{file}: {size} bytes are too few for its header: it was cut off; copy or download it again"
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            whole = [size for tensor in header.values() for size in tensor["shape"]]
            if not all(isinstance(size, int) for size in whole) or any("dtype" not in t for t in header.values()):
                raise ValueError("a tensor without dtype or shape")
            expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, AttributeError, TypeError, LookupError):
            return {}, f"{file}: its header is not JSON: it is no safetensors file; copy or download it again"
    if size != expected:
        short = f"{size:,} bytes where its header says {expected:,}: it was cut off; copy or download it again"
        return {}, f"{file}: {short}"
    return header, None


def weight_files(folder: Path, where: str | None = None) -> tuple[list[Path], list[str]]:
    """The safetensors files that make up the model, in transformers' order: the file that config.json
    names (`transformers_weights`), model.safetensors, then those of the index; and what is wrong with the set. Where
    the files could mean two different sets, none is used."""
    where, (whole, index) = where or str(folder), _places(folder)
    names, problem = _names_in(index) if index and index.is_file() else ([], None)
    if problem:
        return [], [problem]
    if whole and whole.is_file():
        others = [name for name in names if name != whole.name and (folder / name).is_file()]
        two = (
            f"{where}: holds two sets of weights, {whole.name} and {', '.join(others[:2])} ..., which its index names; "
            "remove the set that you do not want"
        )
        return ([], [two]) if others else ([whole], [])
    if names:
        missing = [name for name in names if not (folder / name).is_file()]
        problems = [f"{where}: {', '.join(missing)} missing, which its index names; copy them too"] if missing else []
        return [folder / name for name in names if name not in missing], problems
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return [], [only_pickled(where, pickles[0])]
    wanted = str(whole or index).removeprefix(f"{folder}/")
    no_weights = f"{where}: no {wanted} in it; give the folder that save_pretrained wrote"
    return [], [_only_gguf(folder, where) or no_weights]


def index_without_metadata(folder: Path) -> list[str]:
    """The problem of an index that transformers itself cannot read, though it names all files."""
    _, index = _places(folder)
    if index is None or not index.is_file() or weight_files(folder)[0] == [folder / "model.safetensors"]:
        return []
    if isinstance(json.loads(index.read_text(encoding="utf-8")).get("metadata"), dict):
        return []
    return [f'{index}: has no "metadata", without which transformers reads no index; add "metadata": {{}}']


def _places(folder: Path) -> tuple[Path | None, Path | None]:
    """Where a single file of weights and where an index of several would lie; one alone where config.json names it."""
    named = (atomic.read_json(folder / "config.json") or {}).get("transformers_weights")
    if not named or not isinstance(named, str):
        return folder / "model.safetensors", folder / INDEX
    return (None, folder / named) if named.endswith(".index.json") else (folder / named, None)


def _names_in(index: Path) -> tuple[list[str], str | None]:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({Path(name).as_posix() for name in named}), None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return [], f"{index}: cannot be read as an index ({error!r}); copy the model folder again"


def _only_gguf(folder: Path, where: str) -> str | None:
    """The problem of a folder that holds GGUF files alone; None: it holds none."""
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if not files:
        return None
    return (
        f"{where}: holds GGUF files ({', '.join(files[:3])}) and no safetensors; name one of them, as in "
        f"{folder / files[0]}, with model.convert=true, which unpacks it into outputs/converted"
    )


def _context(config: dict[str, Any]) -> int | None:
    text = text_part(config)
    context = next((text[key] for key in CONTEXT_KEYS if text.get(key)), None)
    return context if isinstance(context, int) and context > 0 else None


def _pickled_facts(config: dict[str, Any], size: int) -> ModelFolder:
    dtype = config.get("dtype") or config.get("torch_dtype")
    weights = size // (2 if dtype in ("float16", "bfloat16") else 4)
    return ModelFolder(_context(config), {}, weights, size, to_convert=True)


def _facts(config: dict[str, Any], tensors: dict[str, Any]) -> ModelFolder:
    order = -1 if config.get("model_type") in CONV1D else 1
    shapes = {name: tuple(tensor["shape"][::order]) for name, tensor in tensors.items()}
    sizes = [tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors.values()]
    return ModelFolder(
        context=_context(config),
        linears={name: shape for name, shape in shapes.items() if len(shape) == 2 and IN_A_BLOCK.search(name)},
        weights=sum(math.prod(shape) for shape in shapes.values()),
        saved_bytes=sum(sizes),
    )


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
            f"{where}: its weights are quantised ({method}, by quantization_config in its config.json); {UNQUANTISED}"
        )
    code = code_of(config)
    if code and not trust_remote_code and not known_to_transformers(str(config.get("model_type"))):
        problems.append(
            f"{where}: transformers has no {_kind(config)}, and model.trust_remote_code=false forbids the code that "
            f"comes with the model; it would run {', '.join(code)}: read these files, then set "
            "model.trust_remote_code=true"
        )
    return problems


def quantised_tensors(tensors: Mapping[str, Any], where: str) -> list[str]:
    """The problem of matrices in blocks that are saved as integers or in 8 bits. `tensors`: safetensors headers."""
    odd = [name for name, tensor in tensors.items() if tensor["dtype"] in QUANTISED_DTYPES and len(tensor["shape"]) > 1]
    if not odd:
        return []
    dtype = tensors[odd[0]]["dtype"]
    return [f"{where}: its weights are quantised ({odd[0]} is saved as {dtype}); {UNQUANTISED}"]


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
