"""Pickled weights (.bin) converted to safetensors when the user asks for it (`model.convert=true`).

They are read by torch.load(weights_only=True), which builds tensors and plain containers and runs no code; whatever
else a file asks for is refused.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from besa_exp.checkpoints.conversion import converted_once
from besa_exp.checkpoints.inspect import pickled_files
from besa_exp.errors import ConfigurationError, first_line

NOT_COPIED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")


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
    weight_map: dict[str, str] = {}
    size = 0
    for number, source in enumerate(sources, start=1):
        name = f"model-{number:05d}-of-{len(sources):05d}.safetensors" if len(sources) > 1 else "model.safetensors"
        tensors = read_pickled(source)
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(sources) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
