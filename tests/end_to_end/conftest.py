"""Models small enough for whole runs in a second, the arguments of such runs, a finished one and an unfinished one."""

from __future__ import annotations

import shutil
from pathlib import Path

import checked_shapes  # noqa: F401 - before the rooms that it checks
import pytest
import torch
from resumed_runs import BLOCKS, killed
from safetensors.torch import save_file
from tiny_llama import byte_tokenizer, tiny_llama

from besa_exp.cli.main import main


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


@pytest.fixture(scope="session")
def request_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of five blocks with some steps each, without its folder."""
    folder = tmp_path_factory.mktemp("dense")
    model = tiny_llama(32, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    for name in ("tokens", "more"):
        save_file({"input_ids": torch.randint(0, 256, (16, 24), generator=generator)}, folder / f"{name}.safetensors")
    tokens, more = folder / "tokens.safetensors", folder / "more.safetensors"
    scored = ["evaluator=perplexity", f"evaluator.perplexity_sets=[{tokens},{more}]"]
    chosen = ["pruner=besa", "tracker=none", "device=cpu", "model.dtype=float32", "save.verify=false", *scored]
    return ["prune", f"model.path={folder / 'model'}", f"calibration.path={tokens}", *chosen]


@pytest.fixture(scope="session")
def unbroken(request_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run, finished in one go."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert main([*request_arguments, f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="session")
def killed_after_three_blocks(request_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run, killed with at least three finished blocks; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    killed(request_arguments, folder, [{"blocks": 3}])
    return folder


@pytest.fixture
def unfinished(killed_after_three_blocks: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(killed_after_three_blocks, tmp_path / "run")
