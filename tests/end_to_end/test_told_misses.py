"""`besa prune` tells a target that it cannot meet before it loads a model, and one that it missed in the end. End to
end because it is told at both ends of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wandb_file import summary

from besa_exp.cli.main import main


def test_a_target_out_of_reach_is_told_before_the_model_is_loaded_and_in_the_end(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tracked = [line for line in given if line != "tracker=none"]
    assert main(["prune", *tracked, "pruner=besa_paper", "sparsity=0.8"]) == 0
    before, _, after = capsys.readouterr().out.partition("loading ")
    assert "WARNING: sparsity=0.8 will be missed: besa_paper with these keys reaches 37.6 to 62.4 %" in before
    assert "pruner=besa meets any target" in before
    (closing,) = [line for line in after.splitlines() if line.startswith("done: ")]
    assert "missed its target of 80 % by" in closing
    (card,) = Path("outputs").glob("*/model/README.md")
    assert "**missed its target of 80 % by" in card.read_text()
    folder = card.parents[1]
    miss = json.loads((folder / "results.json").read_text())["measured_sparsity"] - 0.8
    assert summary(folder)["target_missed"] == pytest.approx(miss)
    assert miss < -0.1


def test_a_target_within_reach_is_met_without_a_word(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", *given, "pruner=magnitude", "sparsity=0.8"]) == 0
    assert "miss" not in capsys.readouterr().out


def test_a_dry_run_tells_a_target_out_of_reach(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", *given, "pruner=besa_paper", "sparsity=0.2", "dry_run=true"]) == 0
    assert "note: sparsity=0.2 will be missed" in " ".join(capsys.readouterr().out.split())
