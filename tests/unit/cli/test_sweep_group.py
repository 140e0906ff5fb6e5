"""W&B shows the jobs of a sweep as one group."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from besa_exp.cli.jobs import GROUP, grouped
from besa_exp.cli.request import Job


def jobs(group: str | None) -> list[Job]:
    config = OmegaConf.create({"tracker": {"group": group}})
    return [Job(("seed=1", f"pruner={name}"), config, Path(name), False) for name in ("besa", "wanda")]


def test_a_sweep_without_a_study_is_named_after_what_varies_and_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GROUP, raising=False)
    with grouped(jobs(None)):
        assert re.fullmatch(r"sweep of pruner, \d{4}-\d\d-\d\d \d\d:\d\d", os.environ[GROUP])
    assert GROUP not in os.environ


def test_a_group_that_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GROUP, raising=False)
    with grouped(jobs("study")):
        assert GROUP not in os.environ
    monkeypatch.setenv(GROUP, "mine")
    with grouped(jobs(None)):
        assert os.environ[GROUP] == "mine"
    assert os.environ[GROUP] == "mine"
