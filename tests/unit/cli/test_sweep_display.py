"""What a sweep says of its jobs and in the end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from run_folders import finished_run, unfinished_run

from besa_exp.cli.sweep_display import Course, Outcome, show_sweep


def test_a_job_is_described_by_what_varies_its_place_and_the_time_left() -> None:
    course = Course(4, frozenset({"tracker=none"}), frozenset(), time.time() - 60)
    line = course.line(2, ["pruner=besa", "tracker=none", "sparsity=0.7"], Path("outputs/x"))
    assert line.startswith("job 3 of 4: pruner=besa sparsity=0.7, about 1 min 00 s left -> outputs/x")  # 30 s a job


def test_jobs_that_were_finished_before_do_not_make_the_others_look_fast() -> None:
    course = Course(4, frozenset(), frozenset({0}), time.time() - 60)
    assert "about 2 min 00 s left" in course.line(2, ["seed=2"], Path("x"))
    assert "left" not in course.line(1, ["seed=1"], Path("x"))


def test_a_sweep_ends_with_its_jobs_and_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pruner, value in (("wanda", 20.0), ("besa", 12.0)):
        finished_run(tmp_path / pruner, {"pruner": pruner, "perplexity": {"wikitext2": value}})
    (unfinished_run(tmp_path / "bad", status="failed") / "run.log").touch()
    outcomes = [Outcome(tmp_path / name, "done", "50.00 % zeros") for name in ("wanda", "besa")]
    failed = [Outcome(tmp_path / name, "failed", text) for name, text in (("bad", "block 3: no"), ("lost", "gone"))]
    show_sweep([*outcomes, *failed], 125.0)
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "4 jobs: 2 done, 2 failed, 2 min 05 s"
    bad, lost = [line for line in shown.splitlines() if "block 3: no" in line or "gone" in line]
    assert "run.log" in bad
    assert "run.log" not in lost  # it has not begun
    assert shown.index("12.000") < shown.index("20.000")  # the best first
    assert shown.splitlines()[-1] == f"charts and LaTeX: besa report {tmp_path}"
    show_sweep(outcomes)
    assert "what happened" not in capsys.readouterr().out  # nothing did
