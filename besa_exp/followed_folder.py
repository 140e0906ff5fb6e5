"""What the ranks other than the first have in the place of the run folder: its paths, to read; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from besa_exp.reports import BlockReport, Step

if TYPE_CHECKING:
    from besa_exp.evaluation.scores import Scores


class FollowedFolder:
    """The run folder that rank 0 has open, which all ranks reach under the same path."""

    def __init__(self, path: Path):
        self.path = path
        self.model = path / "model"
        self.masks = path / "masks.safetensors"
        self.tokens = path / "calibration.safetensors"
        self.blocks = path / "blocks"
        self.scores = path / "scores.json"

    def rewind(self, reports: Sequence[BlockReport]) -> None:
        pass

    def write_config(self, config: Mapping[str, Any]) -> None:
        pass

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        pass

    def write_results(self, results: Mapping[str, Any]) -> None:
        pass

    def log_step(self, step: Step) -> None:
        pass

    def log_block(self, report: BlockReport) -> None:
        pass

    def log_scores(self, which: str, scores: Scores) -> None:
        pass
