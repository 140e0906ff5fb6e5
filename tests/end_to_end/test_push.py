"""The model of a finished run on the hub, a stand-in server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_process import hub_of
from hub_server import TOKEN

from besa_exp.cli.main import main

Prune = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What the hub holds."""
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


@pytest.fixture
def prune(root: Path, given: list[str], tmp_path: Path) -> Iterator[Prune]:
    """Runs the real command with a token and that hub."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    with hub_of(root) as address:

        def run(*keys: str, **changed: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "besa_exp", "prune", *given, "hydra.run.dir=run", *keys]
            variables = environment | {"HF_ENDPOINT": address} | changed
            return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)

        yield run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_hub_receives_the_models_bytes_in_a_private_repository_and_nobody_is_told_the_token(
    prune: Prune, root: Path
) -> None:
    done = prune("save.push_to_hub=me/pruned", "tracker=wandb")
    assert done.returncode == 0, done.stderr
    assert "pushed run/model to http" in done.stdout
    assert contents(root / "models" / "me" / "pruned") == contents(Path("run/model"))
    assert json.loads((root / "visibility.json").read_text()) == {"me/pruned": "private"}
    assert TOKEN not in done.stdout + done.stderr
    assert not [name for name, content in contents(Path("run")).items() if TOKEN.encode() in content]


def test_a_push_that_fails_is_a_warning_with_the_command_that_pushes_later_and_the_run_is_whole(
    prune: Prune, root: Path
) -> None:
    done = prune("save.push_to_hub=full/pruned")
    assert done.returncode == 0
    assert "storage limit reached" in done.stderr
    assert "hf upload full/pruned run/model . --private" in done.stderr
    assert json.loads(Path("run/status.json").read_text())["status"] == "done"
    assert Path("run/results.json").is_file()
    before = contents(Path("run"))
    again = prune("save.push_to_hub=me/pruned")  # the finished run is pushed, not repeated
    assert again.returncode == 0, again.stderr
    assert contents(Path("run")) == before
    assert contents(root / "models" / "me" / "pruned") == contents(Path("run/model"))


def test_a_hub_that_is_not_there_loses_nothing(prune: Prune) -> None:
    done = prune("save.push_to_hub=me/pruned", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0
    assert "was not pushed to me/pruned" in done.stderr
    assert Path("run/results.json").is_file()


def test_what_cannot_be_pushed_is_refused_before_the_run(
    given: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for keys, told in (
        (["save.push_to_hub=me/x", "offline=true"], "which offline=true forbids"),
        (["save.push_to_hub=me/x"], "no token for the hub"),
        (["save.push_to_hub=me/x", "save.model=false"], "add save.model=true"),
        (["save.push_to_hub=mine"], "as owner/name"),
        (["save.push_to_hub=a/b/c"], "as owner/name"),
        (["-m", "seed=0,1", "save.push_to_hub=me/x", "save.model=true"], "2 jobs of the sweep would push to it"),
    ):
        assert main(["prune", *given, *keys]) == 2
        assert told in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_jobs_of_a_sweep_with_names_of_their_own_are_let_through(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    keys = ["seed=0,1", "save.push_to_hub=me/x-${seed}", "save.model=true", "dry_run=true"]
    assert main(["prune", *given, "-m", *keys]) == 0, capsys.readouterr().err
