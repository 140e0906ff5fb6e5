"""Every experiment and testbed runs: its first job in miniature, on a random model and tokens, all else as it says; and
every study collects what runs leave. End to end because a preset is right when a run takes it, and a collector when it
reads what a run of today has written."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from studies import EXPERIMENTS, collect_of, records_of

from besa_exp.cli.compose import Composer
from besa_exp.cli.configuration import as_values, method_name, read_settings
from besa_exp.cli.main import main
from besa_exp.presets import CONF_DIR, presets
from besa_exp.report.runs import read_run
from besa_exp.runs.prune import prune

MINIATURE = ["model.dtype=float32", "calibration.num_samples=4", "device=cpu", "tracker=none", "evaluator.tasks=[]"]
MINIATURE.append("save.verify=false")  # in a process of its own


def first_job(lines: list[str]) -> list[str]:
    """The lines of the first job of a sweep, or of the only one."""
    composer = Composer("prune")
    config = compose("prune", lines, return_hydra_config=True)
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    return composer.spread(composer.parse(lines), params)[0]


CASES = [*([f"experiment={name}"] for name in presets("experiment"))]
CASES += [
    ["experiment=best", f"testbed={name}"] for name in presets("testbed") if name not in ("embedded", "tinystories")
]
CASES += [["experiment=paper_layer_wise", "testbed=tinystories"]]


@pytest.mark.parametrize("chosen", CASES, ids=" ".join)
def test_an_experiment_runs_in_miniature(chosen: list[str], given: list[str], tmp_path: Path) -> None:
    paths = [line for line in given if line.startswith(("model.path=", "calibration.path="))]
    tokens = next(line for line in paths if line.startswith("calibration")).partition("=")[2]
    lines = [*chosen, *MINIATURE, *paths, f"evaluator.perplexity_sets=[{tokens}]"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("prune", first_job(lines), return_hydra_config=True)
        values = as_values(config)
        settings = read_settings(config, method_name(config.hydra.runtime.choices))
    results = prune(settings, tmp_path / "run", values)
    assert results["perplexity"][tokens] > 1
    assert results["unavailable"] == {}
    assert json.loads((tmp_path / "run" / "results.json").read_text())["pruner"] == results["pruner"]


@pytest.fixture
def made(given: list[str], model_dir: Path, tmp_path: Path) -> list[Path]:
    """The folders of a dense and a pruned run of one model, as studies make them."""
    asked = [line for line in given if not line.startswith(("pruner=", "evaluator="))]
    tokens = next(line for line in asked if line.startswith("calibration")).partition("=")[2]
    scored = ["evaluator=perplexity", f"evaluator.perplexity_sets=[{tokens}]", "evaluator.simulated_speed=true"]
    folders = {pruner: tmp_path / "runs" / "babyllama-105" / pruner for pruner in ("dense", "besa")}
    for pruner, folder in folders.items():
        lines = [*asked, *scored, f"pruner={pruner}", "model.name=babyllama-105", f"hydra.run.dir={folder}"]
        assert main(["prune", *lines]) == 0
    (tmp_path / "shared" / "models").mkdir(parents=True)
    (tmp_path / "shared" / "models" / "babyllama-105").symlink_to(model_dir)
    (tmp_path / "tokens" / "babyllama-105").mkdir(parents=True)
    (tmp_path / "tokens" / "babyllama-105" / "held-out.safetensors").symlink_to(tokens)
    return [*folders.values()]


def test_every_study_collects_what_runs_leave(made: list[Path], tmp_path: Path, monkeypatch) -> None:
    read = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in made]
    perplexities = sorted(value for results in read for value in results["perplexity"].values())
    beds = tmp_path / "beds"
    beds.mkdir()
    (beds / "babyllama").symlink_to(made[0].parent)

    def collected(study: str, found: Callable[[Any], list[dict[str, Any]]]) -> tuple[Any, list[dict[str, Any]]]:
        module = collect_of(study, monkeypatch)
        records = found(module)
        assert sorted(record["perplexity"] for record in records) == pytest.approx(perplexities), study
        return module, [*records_of(study), *records]

    best, records = collected("best", lambda module: [module.record(read_run(folder)) for folder in made])
    assert best.tables(best.Rows(records))
    first, records = collected("first_results", lambda module: module.read_runs(tmp_path / "runs"))
    assert first.tables({"babyllama-105": records})
    joint, records = collected("joint", lambda module: module.read_runs(made[0].parent))
    assert joint.table(records)
    given = tmp_path / "shared", tmp_path / "tokens"
    paper, records = collected("paper", lambda module: module.found(made[0].parent, *given))
    assert [len(row["error"]) for row in records[-2:]] == [2, 2]
    assert paper.tables.tables([row for row in records if row["method"] == "dense" or len(row["loss"]) == 5])
    structure, records = collected("structure", lambda module: module.read_runs(beds))
    assert structure.table(records)
    recovery = collect_of("recovery", monkeypatch)
    assert [recovery.cells(recovery.record(folder / "results.json"))[2] for folder in made]
    real = collect_of("real_model", monkeypatch)
    rows = [real.record(read_run(folder)) for folder in made]
    assert sorted(value for row in rows for value in row["scores"].values()) == pytest.approx(perplexities)
    assert real.cost_table(rows)


@pytest.mark.parametrize("study", ["first_results", "paper", "real_model"])
def test_tokens_of_a_study_without_its_texts_are_refused(study: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    tokens = importlib.import_module("tokens")
    with pytest.raises(SystemExit, match=r"has no .*data/.*; name a folder"):
        tokens.main([study, "--shared", str(tmp_path), "--out", str(tmp_path / "tokens")])
    assert not (tmp_path / "tokens").exists()
