"""What becomes of jobs, and what a sweep says: a line a job with what varies and the time left, and in the end the jobs
and the comparison."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from besa_exp.cli.compare import tables
from besa_exp.cli.request import Job
from besa_exp.display.progress import duration
from besa_exp.display.terminal import console_of, counted
from besa_exp.report.comparison import compare
from besa_exp.report.runs import read_run

WIDTH_OF_FILES = 200  # columns of a table that no terminal shows
MANY = 30  # jobs, above which the finished ones are not listed one by one
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

    @property
    def log(self) -> str:
        """`; see outputs/.../run.log`, where a run has begun one."""
        file = self.folder / "run.log"
        return f"; see {file}" if file.is_file() else ""


@dataclass(frozen=True)
class Course:
    """Where a job stands in its sweep: `total` jobs, of which `common` lines do not vary; `skipped` were finished
    before it `began` (time.time, which all processes of a machine share)."""

    total: int
    common: frozenset[str]
    skipped: frozenset[int]
    began: float

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Course:
        common = frozenset.intersection(*(frozenset(job.lines) for job in jobs)) if len(jobs) > 1 else frozenset()
        return cls(len(jobs), common, frozenset(job.number for job in jobs if job.finished), time.time())

    def line(self, number: int, lines: Sequence[str], folder: Path) -> str:
        """`job 4 of 13: pruner=besa sparsity=0.5, about 9 min left -> outputs/...`."""
        varied = " ".join(line for line in lines if line not in self.common) or " ".join(lines)
        done = len([one for one in range(number) if one not in self.skipped])
        left = len([one for one in range(number, self.total) if one not in self.skipped])
        known = f", about {duration((time.time() - self.began) / done * left)} left" if done else ""
        return f"job {number + 1} of {self.total}: {varied}{known} -> {folder}"


def show_sweep(outcomes: Sequence[Outcome], seconds: float | None = None) -> None:
    """The jobs, a line each with its error, then what `besa compare` shows of their folders."""
    console = console_of(WIDTH_OF_FILES)
    took = f", {duration(seconds)}" if seconds is not None else ""
    console.print(Text(f"{len(outcomes)} jobs: {counted(o.status for o in outcomes)}{took}", style="bold"))
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    told = [_told(outcome) for outcome in outcomes]
    for column in ("job", "status", "folder", *(["what happened"] if any(told) else [])):
        table.add_column(column, overflow="fold")
    for number, outcome in enumerate(outcomes):
        if outcome.exit_code or outcome.missed or len(outcomes) <= MANY:
            style = "red" if outcome.exit_code else "yellow" if outcome.missed else None
            cells = (str(number + 1), outcome.status, Text(str(outcome.folder)), Text(told[number]))
            table.add_row(*cells[: len(table.columns)], style=style)
    console.print(table)
    runs = [read_run(outcome.folder) for outcome in outcomes if (outcome.folder / "results.json").is_file()]
    for part in tables(runs, compare(runs), console.width):
        console.print(part)
    if runs:
        places = dict.fromkeys(shlex.quote(str(outcome.folder.parent)) for outcome in outcomes)
        console.print(Text(f"charts and LaTeX: besa report {' '.join(places)}", style="dim"))


def _told(outcome: Outcome) -> str:
    if outcome.exit_code:
        return f"{outcome.text}{outcome.log}"
    return outcome.text.partition(", ")[0] if outcome.missed else ""
