"""The saved model in a fresh process: what is amiss with the files is an error, what is too large is said. End to end
because the process is the point."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from besa_exp.checkpoints import fresh_process
from besa_exp.errors import RunError

TOKENS = torch.arange(16).view(1, 16)
REQUEST = {"folder": "saved", "input_ids": TOKENS.tolist(), "trust_remote_code": False, "routes": False}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def saved(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "saved"))


def reload(folder: Path, expected: float) -> dict:
    with fresh_process.reloading(folder, TOKENS, expected, torch.float32, trust_remote_code=False) as answer:
        return answer()


@pytest.mark.parametrize(
    ("damage", "told"), [("another", "computes something else"), ("lacking", f"missing tensors .*{UP}")]
)
def test_files_that_hold_something_else_than_the_pruned_model_are_an_error(saved: Path, damage: str, told: str) -> None:
    expected = fresh_process.token_loss(AutoModelForCausalLM.from_pretrained(saved), TOKENS)
    weights = load_file(saved / "model.safetensors")
    weights[UP] += 1
    if damage == "lacking":
        del weights[UP]
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    request = REQUEST | {"folder": str(saved)}
    with pytest.raises(RunError, match=told):
        fresh_process.checked(fresh_process.reloaded(request), request, expected, tolerance=1e-3)


def test_what_a_fresh_process_cannot_load_is_an_error_with_its_reason(saved: Path) -> None:
    (saved / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"does not load in a fresh process: .*config\.json"):
        reload(saved, 1.0)


def test_another_loss_is_a_warning_where_a_router_chooses_experts(caplog: pytest.LogCaptureFixture) -> None:
    found = {"lacking": [], "left": [], "token_loss": 2.0}
    assert fresh_process.checked(found, REQUEST | {"routes": True}, 1.0, 1e-3)["expected"] == 1.0
    assert "a router may send tokens to other experts" in caplog.text


def test_a_model_that_the_memory_does_not_hold_twice_is_skipped_with_the_reason(saved: Path) -> None:
    with (saved / "huge.safetensors").open("wb") as file:
        file.truncate(2**43)  # a hole: no byte of it is on the disk
    assert "8796.1 GB" in reload(saved, 1.0)["skipped"]
