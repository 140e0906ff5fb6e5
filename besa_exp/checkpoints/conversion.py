"""Models in other formats, converted to safetensors when the user asks for it (`model.convert=true`).

The result lies in `outputs/converted`, appears whole or not at all, and is used again as long as its sources stay. Of
several runs that ask for it one makes it, and the others wait. Pickled weights (.bin) are read by
torch.load(weights_only=True), which builds tensors and plain containers and runs no code; whatever else a file asks for
is refused. GGUF files: see `gguf_weights`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from besa_exp.checkpoints.inspect import pickled_files
from besa_exp.checkpoints.shards import METADATA, shard_names, write_index
from besa_exp.errors import ConfigurationError, first_line
from besa_exp.machine import atomic

CONVERTED = Path("outputs") / "converted"
LOCK = Path("outputs") / ".converted.lock"
NOT_COPIED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
logger = logging.getLogger(__name__)


def converted_once(source: Path, files: Sequence[Path], write: Callable[[Path], None]) -> Path:
    """The folder that `write` fills, unless it is there: it is named after `source` and after the names, sizes and
    times of change of the `files` that it is made of. RunError: it cannot be written."""
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    digest = hashlib.sha256(json.dumps([str(source.resolve()), stamps]).encode()).hexdigest()
    target = CONVERTED / f"{source.resolve().name.removesuffix('.gguf')}-{digest[:12]}"
    told = atomic.writing(f"{target} could not be written", "free disk space, or run where outputs/ is writable")
    with told, atomic.alone(LOCK, lambda: logger.info("%s: another run converts a model; waiting for it", source)):
        if not target.is_dir():
            with atomic.replaced_folder(target) as partial:
                write(partial)
    return target


def converted_folder(folder: Path) -> Path:
    """The folder's model with safetensors in place of its .bin files. ConfigurationError: a file holds more than
    tensors, or tensors without data; RunError: it cannot be written."""
    sources, _ = pickled_files(folder)
    return converted_once(folder, sources, lambda partial: _write(folder, sources, partial))


def _write(origin: Path, sources: list[Path], folder: Path) -> None:
    """One safetensors file for each source, of the same name but for its ending, their index, and what else `origin`
    holds."""
    for file in origin.iterdir():
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            shutil.copyfile(file, folder / file.name)
    num_parameters = 0
    names = shard_names(len(sources)) if len(sources) > 1 else ["model.safetensors"]
    for source, name in zip(sources, names, strict=True):
        tensors = read_pickled(source)
        save_file(tensors, folder / name, METADATA)
        num_parameters += sum(tensor.numel() for tensor in tensors.values())
    if len(sources) > 1:
        write_index(folder, names, num_parameters)


def read_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of one file by name, each with memory of its own (tied ones are written twice). ConfigurationError:
    it holds anything else."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"{file}: is not read, as it holds more than tensors or is damaged ({first_line(error)}); load it where "
            "you trust it and write it with save_pretrained(folder)"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigurationError(f"{file}: holds no plain dictionary of tensors; write it with save_pretrained(folder)")
    empty = [name for name, tensor in content.items() if tensor.is_meta]
    if empty:
        raise ConfigurationError(
            f"{file}: {empty[0]} has no data (a meta tensor); save the model where its weights are loaded"
        )
    return {str(name): tensor.clone().contiguous() for name, tensor in content.items()}
