"""The model of a finished run on the hub, a stand-in server on this machine. End to end because the token comes from
the environment and must reach the server alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hub_process import hub_of
from hub_server import TOKEN
from one_process import answers

from besa_exp.cli.main import main


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_pushed_or_told_how_to_be_pushed_later_and_is_whole_either_way(
    given: list[str], tmp_path: Path
) -> None:
    """One process with a token and that hub: a run whose hub is not there, its push where there is no room, then its
    push that is taken; and a run that is pushed at once."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"WANDB_MODE": "offline"}
    root = tmp_path / "hub"
    root.mkdir()
    ours, pushed_at_once = ["prune", *given, "hydra.run.dir=run"], ["hydra.run.dir=other", "tracker=wandb"]
    with hub_of(root) as hub:
        pushes = [
            ("http://127.0.0.1:9", [*ours, "save.push_to_hub=me/pruned"]),
            (hub, [*ours, "save.push_to_hub=full/pruned"]),
            (hub, [*ours, "save.push_to_hub=me/pruned"]),
            (hub, ["prune", *given, *pushed_at_once, "save.push_to_hub=me/other"]),
        ]
        told = answers(pushes, environment)
    assert [code for code, _ in told] == [0, 0, 0, 0]
    absent, full, later, at_once = (said for _, said in told)
    assert "was not pushed to me/pruned" in absent
    assert "done: " in absent
    assert "storage limit reached" in full
    assert "hf upload full/pruned run/model . --private" in full
    assert "finished before" in later  # the finished run is pushed, not repeated
    assert json.loads(Path("run/status.json").read_text())["status"] == "done"
    assert "pushed other/model to http" in at_once
    for name in ("run", "other"):
        there = root / "models" / "me" / ("pruned" if name == "run" else name)
        assert contents(there) == contents(Path(name, "model"))
        assert not [file for file, content in contents(Path(name)).items() if TOKEN.encode() in content]
    assert json.loads((root / "visibility.json").read_text()) == {"me/pruned": "private", "me/other": "private"}
    assert not [said for _, said in told if TOKEN in said]


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
