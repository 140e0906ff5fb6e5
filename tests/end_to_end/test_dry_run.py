"""`dry_run=true` on the command line: it tells, exits with 0, and leaves nothing behind. End to end because the same
words must start a run afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from besa_exp.cli.main import main
from besa_exp.cli.prune import prune
from besa_exp.errors import ConfigurationError

PARTS = ("weights", "activations and targets", "statistics, pruner and forward pass at work")
PARTS += ("finished blocks and masks", "masks.safetensors", "saved shards", "logs and metrics", "peak")
TIMES = ("load", "calibrate", "prune: 2 blocks of", "save", "evaluate", "total")


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["prune", *arguments, "dry_run=true"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("pruner", "load"), [("besa", "whole"), ("sparsegpt", "streamed")])
def test_every_part_is_told_and_nothing_is_left(
    pruner: str, load: str, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = ["evaluator=perplexity", f"evaluator.perplexity_sets=[{tmp_path / 'tokens.safetensors'}]"]
    said = told(capsys, *given, f"pruner={pruner}", f"model.load={load}", *scored)
    for part in (*PARTS, *TIMES, "evaluation: a batch's logits"):
        assert part in said
    assert "not estimated" not in said
    assert "memory of the host: fits: " in said
    assert "disk of the run folder: fits: " in said
    assert list(Path.cwd().iterdir()) == []


def test_no_weight_is_read(given: list[str], model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = model_dir / "model.safetensors"
    whole = weights.read_bytes()
    save_file({name: tensor * float("nan") for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    try:
        assert "total" in told(capsys, *given, "pruner=wanda")
    finally:
        weights.write_bytes(whole)


def test_the_same_command_without_it_starts_fresh_and_a_finished_run_stays_as_it_is(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(told(capsys, *given).split(":")[0])
    assert main(["prune", *given]) == 0
    results = folder / "results.json"
    written = (results.read_bytes(), results.stat().st_mtime_ns)
    capsys.readouterr()
    assert "this run is finished" in told(capsys, *given)
    assert (results.read_bytes(), results.stat().st_mtime_ns) == written
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    assert [path.name for path in Path("outputs").iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dry_run=maybe"], "dry_run=maybe: must be true or false"),
        (["dry_run=true", "sparsity=2"], "sparsity=2: must be in [0, 1)"),
        (["dry_run=true", "model.path=/no/such/model"], "there is no such folder"),
        (["dry_run=true", "calibration.path=null", "calibration.num_samples=4"], "the model has no tokenizer"),
    ],
)
def test_what_a_run_would_refuse_is_refused(
    arguments: list[str], said: str, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", *given, "calibration.seq_len=16", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


def test_several_processes_are_not_estimated(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ConfigurationError, match="leave torchrun out"):
        prune([*given, "dry_run=true"])


def test_a_sweep_is_told_in_a_line_a_job_and_a_sum(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, "-m", *given, "pruner=magnitude,wanda", "sparsity=0.3,0.5")
    jobs = [line for line in said.splitlines() if "outputs/" in line]
    assert [line.split("-")[1] for line in jobs] == ["magnitude", "magnitude", "wanda", "wanda"]
    assert "one after the other" in said
    assert list(Path.cwd().iterdir()) == []


def test_the_configuration_shows_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["dry_run"] is False


def test_the_default_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = told(capsys, "calibration.num_samples=8", "calibration.seq_len=64")
    assert "prune: 5 blocks of" in said
    assert "W&B" in said
    assert "not estimated" not in said
    assert list(tmp_path.iterdir()) == []


def test_the_search_for_a_budget_is_counted(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def pruning(generations: int) -> str:
        asked = ["pruner=wanda", "budget=evopress", f"budget.generations={generations}"]
        lines = told(capsys, *given, *asked).splitlines()
        return next(line for line in lines if "prune: 2 blocks of" in line).rstrip().rsplit("  ", 1)[-1]

    assert pruning(2).endswith(" s")
    assert "h" in pruning(10**6)
