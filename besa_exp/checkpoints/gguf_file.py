"""What a GGUF file says about its model before it is converted: its architecture and how its weights are packed.

It is read by the `gguf` package, an extra of this one, without torch. GGUF holds a model as llama.cpp runs it: one
file, its weights in blocks that share a scale (Q4_1: 32 weights of 4 bits with a scale and a minimum in fp16)."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from besa_exp.checkpoints.inspect import IN_A_BLOCK, ModelFolder
from besa_exp.errors import first_line

RECORD = "gguf.json"  # in a folder that was converted
ENCODER_DECODERS = ("t5", "t5encoder", "umt5")
STORED = {"F32": "float32", "BF16": "bfloat16"}  # by the type of most weights; any other: float16
UNREAD = "rope_freqs.weight"  # transformers' loader passes it over


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a GGUF file, by its ending."""
    return str(path).endswith(".gguf")


def inspect_gguf(file: Path, key: str, convert: bool) -> tuple[ModelFolder | None, list[str]]:
    """The facts, or the problem that makes the file unusable; `key` is what a person set to name it."""
    where = f"{key}={file}"
    if not file.is_file():
        return None, [f"{where}: there is no such file; check the path"]
    if not convert:
        return None, [
            f"{where}: a GGUF file, whose weights are packed as llama.cpp runs them; model.convert=true unpacks them "
            "into an ordinary folder in outputs/converted; or give the folder or hub id that it was made from"
        ]
    if importlib.util.find_spec("gguf") is None:
        return None, [f"{where}: GGUF files are read by the package gguf, which is not installed: pip install gguf"]
    try:
        reader = read_gguf(file)
        architecture = str(reader.fields["general.architecture"].contents())
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
        return None, [f"{where}: cannot be read as GGUF ({first_line(error)}); copy or download it again"]
    problem = _refused(reader, architecture)
    return (None, [f"{where}: {problem}"]) if problem else (_facts(reader, architecture), [])


def read_gguf(file: Path) -> Any:
    """The package's own reader, which maps the file into memory and looks at all but the weights."""
    from gguf import GGUFReader  # an extra: it may not be installed

    return GGUFReader(file)


def packing_of(reader: Any) -> dict[str, int]:
    """Weights by how they are packed (Q4_1, F32, ...), the most first."""
    counts: Counter[str] = Counter()
    for tensor in reader.tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return dict(counts.most_common())


def stored_dtype(packing: dict[str, int]) -> str:
    """The dtype of unpacked weights: their own, or float16 for packed ones. float16 rounds scale * level + minimum by
    at most 1 in 2048, and its factors have no more bits than float16."""
    return STORED.get(next(iter(packing)), "float16")


def dequantised(folder: Path) -> dict[str, Any]:
    """{"dequantised": {file, packing, dtype}} for results.json, of a folder that a GGUF file was unpacked into; nothing
    of any other."""
    record = folder / RECORD
    return {"dequantised": json.loads(record.read_text(encoding="utf-8"))} if record.is_file() else {}


def _refused(reader: Any, architecture: str) -> str | None:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    known = {name.replace("_", "") for name in GGUF_CONFIG_MAPPING if name not in ENCODER_DECODERS} - {"general"}
    if architecture.replace("_", "").replace("-", "") not in {name.replace("-", "") for name in known}:
        return (
            f"transformers does not unpack GGUF files of the architecture {architecture}, or it is no decoder; give "
            "the folder or hub id that it was made from"
        )
    parts = reader.fields.get("split.count")
    if parts is not None and int(parts.contents()) > 1:
        return f"is one of {int(parts.contents())} parts; join them with llama.cpp's gguf-split --merge"
    if any(tensor.name == UNREAD for tensor in reader.tensors):
        return (
            f"its rotary positions are scaled by {UNREAD}, which transformers does not read: the model would compute "
            "something else; give the folder or hub id that it was made from"
        )
    return None


def _facts(reader: Any, architecture: str) -> ModelFolder:
    context = reader.fields.get(f"{architecture}.context_length")
    shapes = {tensor.name: tuple(int(size) for size in tensor.shape[::-1]) for tensor in reader.tensors}
    weights = sum(math.prod(shape) for shape in shapes.values())
    return ModelFolder(
        context=int(context.contents()) if context is not None else None,
        linears={name: shape for name, shape in shapes.items() if len(shape) == 2 and IN_A_BLOCK.search(name)},
        weights=weights,
        saved_bytes=weights * (4 if stored_dtype(packing_of(reader)) == "float32" else 2),
        to_convert=True,
    )
