"""A model small enough for whole runs in a second, and the arguments of such a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_llama import tiny_llama


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks whose down_proj has 12 inputs, without a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 12}
    tiny_llama(32, num_attention_heads=2, num_key_value_heads=1, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture
def given(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run that would be accepted, in an empty working folder."""
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": torch.randint(0, 64, (4, 16))}, tokens)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    chosen = ["pruner=magnitude", "evaluator=none", "tracker=none", "device=cpu", "model.dtype=float32"]
    return [f"model.path={model_dir}", f"calibration.path={tokens}", *chosen, "save.verify=false"]
