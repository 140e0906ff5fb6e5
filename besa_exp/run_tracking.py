"""The tracker of a run, open for as long as what it is told of lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from besa_exp import distributed
from besa_exp.reports import BlockReport
from besa_exp.running import Run
from besa_exp.settings import TrackerSettings
from besa_exp.tracking import Tracker, start_tracker


@contextmanager
def tracking(run: Run, config: Mapping[str, Any], reports: Sequence[BlockReport]) -> Iterator[Tracker]:
    """The tracker, finished with what was reported however the run ends."""
    path = run.folder.path
    tracked = run.settings.tracker if distributed.is_first() else TrackerSettings("none")
    tracker = start_tracker(tracked, path, config, path.name, run.settings.pruner_name)
    failed = True
    try:
        yield tracker
        failed = False
    finally:
        tracker.finish(reports, failed)
