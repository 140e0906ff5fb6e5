"""`pruner=dense` scores the model in a run folder and does nothing else. End to end because what it must leave out is a
whole run's calibration, pruning and copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from besa_exp.cli.main import main
from besa_exp.report.runs import read_run


@pytest.fixture
def asked(given: list[str], tmp_path: Path) -> list[str]:
    """A dense run whose calibration file does not exist, scored on one token file."""
    tokens = tmp_path / "scored.safetensors"
    save_file({"input_ids": torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(1))}, tokens)
    kept = [line for line in given if not line.startswith(("calibration.path", "pruner"))]
    scored = ["evaluator=perplexity", f"evaluator.perplexity_sets=[{tokens}]"]
    kept.remove("evaluator=none")
    return ["pruner=dense", "calibration.path=/nowhere/tokens.safetensors", *kept, *scored]


def results() -> tuple[Path, dict[str, Any]]:
    (file,) = Path("outputs").glob("*/results.json")
    return file.parent, json.loads(file.read_text())


@pytest.mark.parametrize("load", ["whole", "streamed"])
def test_a_dense_run_scores_as_evaluate_does_and_reads_no_calibration_and_keeps_no_copy(
    load: str, asked: list[str], model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", *asked, f"model.load={load}"]) == 0
    folder, found = results()
    said = capsys.readouterr().out
    assert "calibration" not in said
    assert "block 1 of 2" not in said
    (scored,) = found["perplexity"]
    evaluated = ["device=cpu", "evaluator=none", "model.dtype=float32", f"evaluator.perplexity_sets=[{scored}]"]
    assert main(["evaluate", f"checkpoint={model_dir}", *evaluated, "hydra.run.dir=evaluated"]) == 0
    expected = json.loads(Path("evaluated/results.json").read_text())
    assert found["perplexity"][scored] == pytest.approx(expected["perplexity"][scored], rel=1e-6)
    assert (found["pruner"], found["target_sparsity"], found["measured_sparsity"]) == ("dense", 0.0, 0.0)
    assert found["calibration"] is None
    counts = [{n: row["weights"] for n, row in block["linears"].items()} for block in found["blocks"]]
    assert counts == [{n: row["weights"] for n, row in block["linears"].items()} for block in expected["blocks"]]
    assert {part.removesuffix("_processor") for part in found["seconds"]} == {"load", "evaluate", "total"}
    assert not [name for name in ("model", "masks.safetensors", "blocks") if (folder / name).exists()]
    assert (read_run(folder).status, read_run(folder).missed, len(read_run(folder).scores)) == ("done", 0.0, 1)


def test_a_dense_run_shares_its_scores_with_the_runs_beside_it_and_later_scores_join_it(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", *asked, "evaluator.dense=true"]) == 0
    folder, found = results()
    assert found["dense"]["perplexity"] == found["perplexity"]
    assert len(list(Path("outputs/.dense_scores").glob("*.json"))) == 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["which"] for line in lines if line["kind"] == "scores"] == ["dense", "pruned"]
    more = tmp_path / "more.safetensors"
    save_file({"input_ids": torch.randint(0, 64, (3, 16))}, more)
    scoring = [
        "evaluate",
        f"checkpoint={folder}",
        "device=cpu",
        "evaluator=none",
        f"evaluator.perplexity_sets=[{more}]",
    ]
    capsys.readouterr()
    assert main(scoring) == 0, capsys.readouterr()
    assert len(results()[1]["perplexity"]) == 2


def test_a_dry_run_of_the_dense_model_counts_neither_calibration_nor_pruning_nor_a_copy(
    asked: list[str], given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = next(line for line in given if line.startswith("calibration.path"))
    there = [calibration if line.startswith("calibration.path") else line for line in asked]
    assert main(["prune", *there, "dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert not [part for part in ("calibrate", "prune:", "masks", " save") if part in said]
    assert "left on disk" in said


def test_a_dense_run_is_refused_a_push_as_it_makes_no_model(asked: list[str], capsys) -> None:
    assert main(["prune", *asked, "save.push_to_hub=owner/name"]) == 2
    assert "pruner=dense makes no model" in capsys.readouterr().err
