"""A run that does not end at the sparsity it was asked for says so, before and after."""

from __future__ import annotations

import csv
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from run_folders import RESULTS, block, finished_run

from besa_exp.cli.jobs import Outcome, finished, show
from besa_exp.cli.main import main
from besa_exp.display.missed_target import missed_by, told_miss
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.besa_paper import BesaPaper
from besa_exp.methods.pruners.candidates import float_candidates, reach
from besa_exp.methods.pruners.quantised import Quantised
from besa_exp.methods.updates.obs import Obs
from besa_exp.methods.updates.updated import Updated
from besa_exp.report.runs import read_run


def means(step: float) -> list[float]:
    """alpha of every choice of candidates whose sigmoid is 1, those of all others being 0."""
    candidates = float_candidates(step).tolist()
    shares = product((1.0, math.e), repeat=len(candidates))
    return [sum(b * p for b, p in zip(beta, candidates, strict=True)) / sum(beta) for beta in shares]


@pytest.mark.parametrize("step", [0.5, 0.3, 0.13])
def test_the_reach_of_softmax_of_sigmoid_is_that_of_all_its_corners(step: float) -> None:
    least, most = reach(step, sigmoid=True)
    assert least == pytest.approx(min(means(step)), abs=1e-6)
    assert most == pytest.approx(max(means(step)), abs=1e-6)


def test_the_published_candidates_reach_0_376_to_0_624_also_inside_other_pruners_and_others_reach_all() -> None:
    for pruner in (BesaPaper(), Quantised(BesaPaper(), "prune"), Updated(BesaPaper(), Obs())):
        assert pruner.traits.reach == pytest.approx((0.376, 0.624), abs=5e-4)
    assert BesaPaper(sigmoid=False).traits.reach == Besa().traits.reach == (0.0, 1.0)


@pytest.mark.parametrize(
    ("measured", "missed"), [(0.5, False), (0.4951, False), (0.495, True), (0.505, True), (0.61, True)]
)
def test_a_miss_begins_at_half_a_point(measured: float, missed: bool) -> None:
    assert bool(missed_by(0.5, measured)) == missed
    assert bool(told_miss({"target_sparsity": 0.5, "measured_sparsity": measured, "pruner": "wanda"})) == missed


def test_a_dense_model_misses_nothing() -> None:
    assert told_miss({"target_sparsity": 0.5, "measured_sparsity": 0.0, "pruner": "dense"}) == ""
    assert told_miss({"measured_sparsity": 0.0}) == ""  # of `besa evaluate`


def test_a_sweeps_table_marks_the_job_that_missed(capsys: pytest.CaptureFixture[str]) -> None:
    met: dict[str, Any] = RESULTS | {"perplexity": {}, "zero_shot": {}}
    outcomes = [finished("done", Path(str(measured)), met | {"measured_sparsity": measured}) for measured in (0.5, 0.4)]
    assert [outcome.missed for outcome in outcomes] == [False, True]
    show(outcomes)
    marked = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "missed its target of 50 %" in line]
    assert marked == ["2"]


def test_a_terminal_shows_the_closing_line_in_yellow(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for missed in (True, False):
        show([Outcome(Path("here"), "done", "61.16 % zeros", missed)])
    assert capsys.readouterr().out.splitlines() == [
        "\x1b[33mdone: 61.16 % zeros -> here\x1b[0m",
        "done: 61.16 % zeros -> here",
    ]


def test_a_report_marks_missed_targets_in_table_page_and_paper(tmp_path: Path, capsys) -> None:
    pytest.importorskip("plotly")
    finished_run(tmp_path / "met", {"pruner": "magnitude"})
    missed = {"measured_sparsity": 0.485, "blocks": [block(0, 0.485)], "model": "llama-7b"}
    finished_run(tmp_path / "missed", missed)
    assert read_run(tmp_path / "missed").missed == pytest.approx(-0.015)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert "1 of them missed their target" in capsys.readouterr().out
    (summary,) = (tmp_path / "report").glob("summary.md")
    assert "20.000 at 48.5%" in summary.read_text(encoding="utf-8")
    rows = list(csv.DictReader((tmp_path / "report" / "summary.csv").read_text(encoding="utf-8").splitlines()))
    assert {row["method"]: float(row["target_missed"]) for row in rows} == {
        "magnitude": 0.0,
        "wanda": pytest.approx(-0.015),
    }
