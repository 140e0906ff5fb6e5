"""The saved model in a fresh process: what is amiss with the files is an error, what is too large is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from besa_exp.checkpoints import fresh_process as reloading
from besa_exp.errors import RunError

TOKENS = torch.arange(16).view(1, 16)
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def saved(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "saved"))


def reload(folder: Path, expected: float) -> dict:
    with reloading.reloading(folder, TOKENS, expected, torch.float32, trust_remote_code=False) as answer:
        return answer()


@pytest.mark.parametrize("damage", ["a weight is another", "a weight is lacking", "the config is no JSON"])
def test_files_that_hold_something_else_than_the_pruned_model_are_an_error(saved: Path, damage: str) -> None:
    expected = reloading.token_loss(AutoModelForCausalLM.from_pretrained(saved), TOKENS)
    weights = load_file(saved / "model.safetensors")
    if damage == "a weight is another":
        weights[UP] += 1
    if damage == "a weight is lacking":
        del weights[UP]
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    if damage == "the config is no JSON":
        (saved / "config.json").write_text("{")
    told = {"a weight is another": "computes something else", "a weight is lacking": f"missing tensors .*{UP}"}
    with pytest.raises(RunError, match=told.get(damage, "does not load in a fresh process: .*config.json")):
        reload(saved, expected)


def test_another_loss_is_a_warning_where_a_router_chooses_experts(saved: Path, caplog) -> None:
    with reloading.reloading(saved, TOKENS, 1.0, torch.float32, False, routes=True) as answer:
        assert answer()["expected"] == 1.0
    assert "a router may send tokens to other experts" in caplog.text


def test_a_model_that_the_memory_does_not_hold_twice_is_skipped_with_the_reason(saved: Path) -> None:
    with (saved / "huge.safetensors").open("wb") as file:
        file.truncate(2**43)  # a hole: no byte of it is on the disk
    assert "8796.1 GB" in reload(saved, 1.0)["skipped"]
