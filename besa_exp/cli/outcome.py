"""What became of a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["done", "finished before", "refused", "failed"]
EXIT_CODES: Mapping[Status, int] = {"done": 0, "finished before": 0, "failed": 1, "refused": 2}


@dataclass(frozen=True)
class Outcome:
    """What became of a job. `text` is the results in a line, or the error."""

    folder: Path
    status: Status
    text: str
    missed: bool = False  # the target
    brief: str = ""  # zeros and time alone: beside a table of the scores

    @property
    def exit_code(self) -> int:
        """0 where the results are there, 1 for a failure inside the run, 2 for a configuration that is refused."""
        return EXIT_CODES[self.status]
