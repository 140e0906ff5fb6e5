"""The tiny Llama that the recorded tuning runs began with, and its windows."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM


def recorded(shared_dir, name):
    """What was recorded of a run: its tensors and its description."""
    folder = shared_dir / "golden" / "tuning"
    if not (folder / f"{name}.safetensors").is_file():
        pytest.skip(f"{folder}/{name}.safetensors is not there: it holds the recorded run")
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())


def recorded_llama(shared_dir, dtype=torch.float32):
    """The model, and `input_ids`."""
    tensors, told = recorded(shared_dir, "base")
    windows = tensors.pop("input_ids")
    model = LlamaForCausalLM(LlamaConfig(**told["config"])).eval().requires_grad_(False)
    model.load_state_dict(tensors)
    return torch.nn.Module.to(model, dtype), windows
