"""A GGUF file unpacked into an ordinary Hugging Face folder, by transformers' own loader (`model.convert=true`).

What GGUF's packing rounded stays rounded: the folder's weights are those that llama.cpp computes with, in the numbers
of `stored_dtype`. Its tokenizer comes along, with its chat template."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from besa_exp.checkpoints.conversion import converted_once
from besa_exp.checkpoints.files import save_beside_weights
from besa_exp.checkpoints.gguf_file import RECORD, packing_of, read_gguf, stored_dtype
from besa_exp.errors import ConfigurationError, first_line
from besa_exp.machine import atomic


def converted_gguf(file: Path) -> Path:
    """The folder of the file's model. ConfigurationError: transformers cannot unpack it, or its tensors are not those
    of the model; RunError: it cannot be written."""
    return converted_once(file, [file], lambda folder: unpack_gguf(file, folder))


def unpack_gguf(file: Path, folder: Path) -> None:
    """Writes the file's model, tokenizer and card to `folder`. ConfigurationError as `converted_gguf`."""
    transformers.utils.logging.disable_progress_bar()
    reader = read_gguf(file)
    packing = packing_of(reader)
    dtype = stored_dtype(packing)
    try:
        model = _unpacked(file, getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ConfigurationError(
            f"{file}: transformers cannot unpack it ({first_line(error)}); give the folder or hub id that it was made "
            "from"
        ) from error
    model.save_pretrained(folder)
    save_beside_weights(model, tokenizer, folder, _card(reader, file, packing, dtype), None)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"), parse_float=_as_written)
    atomic.write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    record = {"file": file.name, "packing": packing, "dtype": dtype}
    atomic.write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _unpacked(file: Path, dtype: torch.dtype) -> Any:
    """The model. ValueError: weights are missing in the file, which transformers would draw at random."""
    asked: dict[str, Any] = {"gguf_file": file.name, "dtype": dtype, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # releases that can compute with packed weights; older ones unpack them
        asked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with redirect_stderr(io.StringIO()):  # a progress bar that no switch of transformers' stops
        loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, **asked)
    model, loading = loaded
    lacking = sorted([*loading["missing_keys"], *(str(found) for found in loading["mismatched_keys"])])
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking[:3])} of {type(model).__name__}")
    if quantizer := getattr(model, "hf_quantizer", None):  # left behind, although nothing is packed any more
        quantizer.remove_quantization_config(model)
    return model


def _as_written(digits: str) -> float:
    """GGUF keeps numbers in fp32, where 1e-5 is 9.999999747378752e-06: the shortest number that is the same in fp32 is
    what the model was made with."""
    value = float(digits)
    return float(str(np.float32(value))) if float(np.float32(value)) == value else value


def _card(reader: Any, file: Path, packing: dict[str, int], dtype: str) -> str:
    licence, name = (reader.fields.get(f"general.{key}") for key in ("license", "name"))
    tags = ["---", f"license: {json.dumps(licence.contents())}", "---", ""] if licence is not None else []
    kinds = ", ".join(f"{count:,} as {kind}" for kind, count in packing.items())
    origin = f"Unpacked from {file.name} (weights: {kinds}) and stored as {dtype}."
    return "\n".join([*tags, f"# {name.contents() if name is not None else file.stem}", "", origin, ""])
