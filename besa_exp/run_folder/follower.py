"""The run folder of several ranks: the first has it open, the others have its paths, to read; they write nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from besa_exp.blocks.reports import BlockReport, ModelStep, Step
from besa_exp.machine import distributed
from besa_exp.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from besa_exp.evaluation.scores import Scores


class FollowedFolder:
    """The run folder that rank 0 has open, which all ranks reach under the same path."""

    def __init__(self, path: Path):
        self.path = path
        self.model = path / "model"
        self.masks = path / "masks.safetensors"
        self.rows = path / "row_sparsities.safetensors"
        self.tokens = path / "calibration.safetensors"
        self.blocks = path / "blocks"
        self.scores = path / "scores.json"
        self.spent = path / "spent.json"

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

    def log_model_step(self, step: ModelStep) -> None:
        pass

    def log_block(self, report: BlockReport) -> None:
        pass

    def log_rows(self, block: int, linears: Mapping[str, Sequence[float]]) -> None:
        pass

    def log_scores(self, which: str, scores: Scores) -> None:
        pass


@contextmanager
def opened(path: Path, overwrite: bool, resume: Mapping[str, Any] | None) -> Iterator[RunFolder | FollowedFolder]:
    """The run folder, which of several ranks the first alone locks and writes."""
    folder = RunFolder.open(path, overwrite, resume) if distributed.is_first() else nullcontext(FollowedFolder(path))
    with folder as opened, distributed.failing_together():
        yield opened
