"""Which dense model a tuning follows."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import finished_run

from besa_exp.runs.tune import teacher_of
from besa_exp.settings import (
    CalibrationSettings,
    EvaluatorSettings,
    ModelSettings,
    RecoverySettings,
    TrackerSettings,
    TuneSettings,
)


@pytest.mark.parametrize(("named", "expected"), [(None, ("org/dense", "v2")), ("org/other", ("org/other", None))])
def test_it_is_the_one_that_is_named_or_else_the_one_that_was_pruned_in_its_revision(
    named: str | None, expected: tuple[str, str | None], tmp_path: Path
) -> None:
    run = finished_run(tmp_path / "run", {"model": "org/dense", "model_revision": "v2"})
    asked = TuneSettings(
        checkpoint=str(run),
        model=ModelSettings("run", str(run / "model")),
        calibration=CalibrationSettings("embedded"),
        recovery=RecoverySettings("blocks"),
        evaluator=EvaluatorSettings("none"),
        tracker=TrackerSettings("none"),
        teacher=named,
    )
    teacher = teacher_of(asked)
    assert teacher is not None
    assert (teacher.path, teacher.revision) == expected
