"""The examples run as they stand: the script's parts in small, the notebook cell by cell without Jupyter. End to end
because that is what a reader does with them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from reloaded_here import reload_here

from besa_exp.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("three_methods", EXAMPLES / "three_methods.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "three_methods", module)  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_the_script_compares_its_methods_and_draws_them(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "CALIBRATION", {"num_samples": 8, "seq_len": 64, "batch_size": 8})
    found, dense = example.compared({"wanda": "wanda", "random": example.Random()}, num_tokens=1024)
    assert dense < found["wanda"][1] < found["random"][1]
    assert all(report.sparsity == 0.5 for report, _ in found.values())
    example.plot(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_methods_of_ones_own_run_from_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user has them: modules on PYTHONPATH, presets beside them."""
    monkeypatch.syspath_prepend(EXAMPLES / "own_methods")
    monkeypatch.chdir(tmp_path)
    methods = ["pruner=chosen_masks", "pruner.steps=4", "pattern=2:4", "recovery=sam", "recovery.steps=3"]
    sizes = ["calibration.num_samples=8", "calibration.seq_len=32", "recovery.held_out=2", "recovery.lr=1e-3"]
    others = ["evaluator=none", "tracker=none", "device=cpu", "save.verify=false", f"hydra.run.dir={tmp_path / 'run'}"]
    presets = ["--config-dir", str(EXAMPLES / "own_methods/presets")]
    assert main(["prune", *presets, *methods, *sizes, *others]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))
    assert (results["pruner"], results["pattern"], results["measured_sparsity"]) == ("chosen_masks+sam", "2:4", 0.5)
    losses = [block["reconstruction_loss"] for block in results["blocks"]]
    assert all(loss["after"] <= loss["before"] for loss in losses)
    assert any(loss["after"] < loss["before"] for loss in losses)
    assert results["recovery"]["loss"]["after"] < results["recovery"]["loss"]["before"]


SMALLER = {"num_samples=16, seq_len=128": "num_samples=8, seq_len=64", "[:4096]": "[:1024]"}  # of the notebook


def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    reload_here(monkeypatch)
    cells = json.loads((EXAMPLES / "three_methods.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {"__name__": "notebook"}
    seen: set[str] = set()
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "clear the outputs before the notebook is committed"
            source = "".join(cell["source"])
            for size in [size for size in SMALLER if size in source]:
                source, seen = source.replace(size, SMALLER[size]), seen | {size}
            exec(compile(source, f"cell {number}", "exec", dont_inherit=True), names)
    assert seen == {*SMALLER}
    scores = names["scores"]
    assert isinstance(scores, dict)
    assert scores["besa"] < scores["wanda"] < scores["random"]
    runs = names["runs"]
    assert runs["measured_sparsity"].tolist() == [0.5]  # type: ignore[index]
