"""What a run shows: its plan, a progress bar over blocks and steps with the time left, then sparsity and scores.

On a terminal this is drawn with rich. Elsewhere it is plain ASCII lines, one a block, through `logging`. Either way
every line is a log record too, so that run.log tells the same story.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from besa_exp.blocks.reports import BlockReport, Step
from besa_exp.display.missed_target import told_miss
from besa_exp.display.tables import as_text, plan_table, result_tables
from besa_exp.settings import RunSettings

PLAIN_WIDTH = 120  # columns of tables in files, where no terminal sets a width
logger = logging.getLogger(__name__)


class RunConsole:
    """Shows one run. Used as a context manager it also shows what the project logs: on a terminal warnings and errors,
    elsewhere everything. `quiet` (plain lines) is chosen by whether standard output is a terminal."""

    def __init__(self, quiet: bool | None = None):
        self._terminal = Console() if quiet is False or (quiet is None and sys.stdout.isatty()) else None
        self._handler = _warnings_to(self._terminal) if self._terminal else _lines_to_stdout()

    def __enter__(self) -> RunConsole:
        project = logging.getLogger("besa_exp")
        project.addHandler(self._handler)
        self._level = project.level
        if not project.isEnabledFor(logging.INFO):
            project.setLevel(logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        project = logging.getLogger("besa_exp")
        project.removeHandler(self._handler)
        project.setLevel(self._level)

    def plan(self, settings: RunSettings, facts: Mapping[str, Any]) -> None:
        """What is about to be done; `facts` are further lines, such as counts of blocks and weights."""
        table = plan_table(settings, facts)
        self._log(table)
        if self._terminal:
            self._terminal.print(table)

    def stage(self, text: str, style: str = "bold") -> None:
        """What happens now, in a line."""
        logger.info(text)
        if self._terminal:
            self._terminal.print(text, style=style, highlight=False, markup=False)

    @contextmanager
    def pruning(self, num_blocks: int, steps_per_block: int | None = None) -> Iterator[PruningProgress]:
        """Progress over the blocks, for as long as the `with` lasts; the steps of a block are learnt from the first."""
        if self._terminal is None:
            yield PruningProgress(num_blocks, steps_per_block, None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._terminal, transient=True) as bars:
            yield PruningProgress(num_blocks, steps_per_block, bars)

    @contextmanager
    def tuning(self, num_steps: int) -> Iterator[Callable[[int, float, float | None], None]]:
        """What is called after each step of a recovery with the steps done, the loss and the held-out loss where it was
        taken: a bar moves, and a held-out loss is a log line."""
        began = time.monotonic()
        first: list[int] = []  # the steps of an earlier attempt come at once

        def log(done: int, held_out: float) -> None:
            rate = (time.monotonic() - began) / max(1, done - first[0] + 1)
            left = f", about {duration(rate * (num_steps - done))} left" if done < num_steps else ""
            logger.info(f"step {done}/{num_steps}: held-out loss {held_out:.4f}{left}")

        def told(done: int, loss: float, held_out: float | None) -> None:
            first[:] = first or [done]
            if held_out is not None:
                log(done, held_out)
            if self._terminal:
                note = f"loss {loss:.4f}" + (f", held out {held_out:.4f}" if held_out is not None else "")
                bars.update(bar, completed=done, note=note)

        columns = (TextColumn("recovery"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, console=self._terminal, transient=True, disable=self._terminal is None) as bars:
            bar = bars.add_task("steps", total=num_steps, note="")
            yield told

    def summary(self, results: Mapping[str, Any], folder: Path) -> None:
        """The content of results.json as tables, its sparsity against the target, and the run folder."""
        self.tables(results)
        seconds = results.get("seconds", {}).get("total")
        took = f", {duration(seconds)}" if seconds is not None else ""
        target, measured = results["target_sparsity"], results["measured_sparsity"]
        line = f"{results['pruner']}: measured sparsity {measured:.4f} (target {target:.4f}){took}"
        missed = told_miss(results)
        self.stage(f"{line}; {missed}" if missed else line, style="bold yellow" if missed else "bold")
        self.stage(f"run folder: {folder}")

    def tables(self, results: Mapping[str, Any]) -> None:
        """The content of results.json as tables: block x linear type sparsity with losses, scores against dense."""
        for table in result_tables(results, PLAIN_WIDTH, box.MARKDOWN):
            self._log(table)
        if self._terminal:
            self._terminal.print(*result_tables(results, self._terminal.width, box.SIMPLE_HEAD))

    def _log(self, content: RenderableType) -> None:
        for line in as_text(content, PLAIN_WIDTH).splitlines():
            logger.info(line)


class PruningProgress:
    """Follows the blocks of one run: bars where there are any, and a log line a block."""

    def __init__(self, num_blocks: int, steps_per_block: int | None, bars: Progress | None):
        self._num_blocks, self._steps_per_block, self._bars = num_blocks, steps_per_block, bars
        self._blocks = self._steps = 0
        self._began = time.monotonic()
        if bars:
            self._block_bar = bars.add_task("blocks", total=num_blocks, note="")
            self._step_bar = bars.add_task("steps", total=steps_per_block, note="", visible=False)

    def step(self, step: Step) -> None:
        """One optimisation step has been made."""
        self._steps += 1
        if self._bars:
            note = f"block {step.block}, loss {step.loss:.4g}"
            self._bars.update(self._step_bar, completed=self._steps, note=note, visible=True)
            self._bars.update(self._block_bar, note=self._time_left())

    def block(self, report: BlockReport) -> None:
        """One block is pruned."""
        self._blocks += 1
        self._steps_per_block, self._steps = self._steps or self._steps_per_block, 0
        left = self._time_left()
        logger.info(
            f"block {self._blocks}/{self._num_blocks}: sparsity {report.sparsity:.4f}, "
            f"reconstruction loss {report.loss_after:.4g} ({report.loss_before:.4g} before), "
            f"{duration(report.seconds)}" + (f", {left}" if left else "")
        )
        if self._bars:
            self._bars.update(self._block_bar, completed=self._blocks, note=left)
            self._bars.reset(self._step_bar, total=self._steps_per_block, visible=False, note="")

    def _time_left(self) -> str:
        within_block = min(1.0, self._steps / self._steps_per_block) if self._steps_per_block else 0.0
        done = (self._blocks + within_block) / self._num_blocks
        if not 0 < done < 1:
            return ""
        return f"about {duration((time.monotonic() - self._began) * (1 - done) / done)} left"


def duration(seconds: float) -> str:
    """`12.3 s`, `3 min 20 s`, `1 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _lines_to_stdout() -> logging.Handler:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_PlainLines())
    return handler


def _warnings_to(terminal: Console) -> logging.Handler:
    handler = RichHandler(logging.WARNING, terminal, show_time=False, show_path=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler


class _PlainLines(logging.Formatter):
    """The message alone, with its level where that is a warning or worse."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname}: {text}" if record.levelno >= logging.WARNING else text
