"""Nothing that goes wrong with W&B ends a run or holds it up."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_file import history

from besa_exp.blocks.reports import BlockReport, LinearReport, Step
from besa_exp.display.tracker import start_tracker
from besa_exp.settings import TrackerSettings

ROOT = Path(__file__).parents[3]
STEP = Step(block=0, step=0, loss=0.75, reconstruction=0.5, penalty=0.25, expected_sparsity=0.5)
LINEARS = (LinearReport("mlp.up_proj", 8, 4, 0.5),)
REPORT = BlockReport(0, LINEARS, loss_before=0.5, loss_after=0.25, seconds=1.5, steps=(STEP,))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "besa_exp.display.tracker")
    return caplog


def tracked_in_another_process(folder: Path, terminal: int | None = None, **variables: str) -> str:
    """Standard output of a process that tracks a step online, W&B's server being a closed port of this machine."""
    code = (
        "import logging, sys, time; from pathlib import Path; from besa_exp.display import tracker, wandb_run\n"
        "from besa_exp.settings import TrackerSettings\n"
        "from besa_exp.blocks.reports import BlockReport, LinearReport, Step\n"
        "logging.basicConfig(stream=sys.stdout, format='%(levelname)s %(message)s'); wandb_run.INIT_TIMEOUT = 2.0\n"
        "settings = TrackerSettings('wandb', mode='online'); began = time.monotonic()\n"
        "tracker = tracker.start_tracker(settings, Path(sys.argv[1]), {}, 'name', 'besa')\n"
        "assert time.monotonic() - began < 60, 'without INIT_TIMEOUT it is 90'\n"
        "steps = (Step(0, 0, 0.75, 0.5, 0.25, 0.5),); linears = (LinearReport('up', 8, 4, 0.5),)\n"
        "tracker.log_block(BlockReport(0, linears, 0.5, 0.25, 1.5, steps)); tracker.finish()"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        env=kept | {"HOME": str(folder), "WANDB_BASE_URL": "http://127.0.0.1:9"} | variables,
        stdin=subprocess.DEVNULL if terminal is None else terminal,
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
        timeout=1000,
        check=True,
    )
    return done.stdout


def test_a_place_that_cannot_be_written_leaves_the_run_going_with_one_warning(
    tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb").write_text("a file where W&B wants its folder")
    tracker = start_tracker(TrackerSettings("wandb"), tmp_path, {}, "name", "besa")
    tracker.log_block(REPORT)
    tracker.finish()
    assert len(warnings.records) == 1
    assert "W&B cannot be used" in warnings.text
    assert "metrics.jsonl is complete" in warnings.text


def test_a_setting_that_wandb_refuses_leaves_the_run_going(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    tracker = start_tracker(TrackerSettings("wandb", mode="nonsense"), tmp_path, {}, "name", "besa")
    tracker.log_block(REPORT)
    tracker.finish()
    assert "W&B cannot be used (ValidationError" in warnings.text


def test_a_failure_while_logging_is_said_once_and_the_run_goes_on(
    tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    tracker = start_tracker(TrackerSettings("wandb"), tmp_path, {}, "name", "besa")
    tracker.finish()  # W&B refuses what comes after the end
    for _ in range(3):
        tracker.log_block(REPORT)
    tracker.finish()
    assert len(warnings.records) == 1
    assert "W&B logging stopped" in warnings.text


def test_a_server_that_does_not_answer_costs_seconds_and_the_run_is_logged_offline(tmp_path: Path) -> None:
    output = tracked_in_another_process(tmp_path, WANDB_API_KEY="a" * 40)
    assert output.startswith("WARNING W&B cannot be reached (")
    assert output.count("\n") == 1
    assert history(tmp_path)[0]["step/loss"] == 0.75


def test_no_question_for_an_account_is_asked_on_a_terminal(tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    try:
        output = tracked_in_another_process(tmp_path, terminal)
    finally:
        os.close(terminal)
        os.close(master)
    assert "No API key configured" in output
    assert history(tmp_path)[0]["step/loss"] == 0.75
