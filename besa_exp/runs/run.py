"""A run under way: what its parts are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from besa_exp.blocks.reports import BlockReport
from besa_exp.checkpoints.load import LoadedModel
from besa_exp.display.console import RunConsole
from besa_exp.display.tracker import Tracker, start_tracker
from besa_exp.machine import distributed
from besa_exp.run_folder.folder import RunFolder
from besa_exp.run_folder.follower import FollowedFolder
from besa_exp.run_folder.spent import Spent
from besa_exp.settings import RunSettings, TrackerSettings


@dataclass(frozen=True)
class Run:
    """One run under way: what is asked, where it is written and shown, and what it has taken so far."""

    settings: RunSettings
    device: torch.device
    folder: RunFolder | FollowedFolder
    console: RunConsole
    spent: Spent


def model_facts(loaded: LoadedModel) -> dict[str, Any]:
    """What the plan shows of a model besides the settings."""
    facts = {
        "weights": f"{sum(parameter.numel() for parameter in loaded.model.parameters()):,}",
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(next(loaded.model.parameters()).device),
    }
    return facts | ({"in memory": "one block at a time"} if loaded.weights else {})


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
