"""What a run shows: what it is about to do, one progress line with the time left, then scores and what to do next.

On a terminal this is drawn with rich. Elsewhere it is plain lines, one a block, through `logging`. Either way every
line is a log record too, and run.log has more than is shown: the whole plan and the zeros of each block.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.logging import RichHandler

from besa_exp.display.missed_target import told_miss
from besa_exp.display.progress import PruningProgress, StageLine, duration
from besa_exp.display.tables import as_text, outline, plan_table, result_tables, sparsity_tables
from besa_exp.errors import ConfigurationError, argument
from besa_exp.settings import RunSettings

PLAIN_WIDTH = 120  # columns of tables in files, where no terminal sets a width
JOB_OF_SWEEP = "BESA_JOB_OF_SWEEP"  # in the environment of a sweep's job: it shows a progress line and nothing else
logger = logging.getLogger(__name__)


class RunConsole:
    """Shows one run. Used as a context manager it also shows what the project logs: on a terminal warnings and errors,
    elsewhere everything but what is for run.log alone. `quiet` (plain lines) is chosen by whether standard output is a
    terminal; `verbose` shows the whole plan and the zeros of each block too."""

    def __init__(self, quiet: bool | None = None, verbose: bool = False):
        drawn = quiet is False or (quiet is None and sys.stdout.isatty())
        self._terminal = Console(file=sys.stdout, highlight=False, emoji=False) if drawn else None
        self._verbose, self._brief = verbose, bool(os.environ.get(JOB_OF_SWEEP)) and not verbose
        self._line = StageLine(self._terminal, self._brief)
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
        self._line.close(well=error is None)
        project = logging.getLogger("besa_exp")
        project.removeHandler(self._handler)
        project.setLevel(self._level)

    def outline(self, settings: RunSettings) -> None:
        """What is about to be done, in two lines, before anything is loaded."""
        for line in outline(settings):
            logger.info(line)
            if self._terminal and not self._brief:
                self._terminal.print(line, markup=False, style="bold" if line.startswith("besa ") else None)

    def plan(self, settings: RunSettings, facts: Mapping[str, Any]) -> None:
        """Every choice, and `facts`, such as counts of blocks and weights: for run.log, and shown where `verbose`."""
        plan = plan_table(settings, facts)
        self._log(plan, shown=self._verbose)
        if self._terminal and self._verbose:
            self._terminal.print(plan)

    def stage(self, text: str) -> None:
        """What happens now, until the next one begins."""
        logger.info(text)
        self._line.begin(text)

    def count(self, done: int, total: int, of: str) -> None:
        """How far the stage is: `done` of `total` windows, questions, ..."""
        self._line.count(done, total, of)

    @contextmanager
    def pruning(
        self, num_blocks: int, seconds_before: Sequence[float] = (), steps_per_block: int | None = None
    ) -> Iterator[PruningProgress]:
        """Progress over the blocks, for as long as the `with` lasts. `seconds_before`: of the blocks that are pruned
        already; the steps of a block are learnt from the first where they are not known."""
        before = len(seconds_before)
        self._line.begin("pruning" + (f" ({before} of {num_blocks} blocks from before)" if before else ""))
        yield PruningProgress(num_blocks, seconds_before, steps_per_block, self._line, logger.info)
        self._line.end()

    @contextmanager
    def tuning(self, num_steps: int) -> Iterator[Callable[[int, float, float | None], None]]:
        """What is called after each step of a recovery with the steps done, the loss and the held-out loss where it was
        taken: the line of progress moves, and a held-out loss is a line of its own."""
        began = time.monotonic()
        first: list[int] = []  # the steps of an earlier attempt come at once

        def show(done: int, loss: float, held_out: float | None) -> None:
            first[:] = first or [done]
            self._line.count(done, num_steps, f"steps, loss {loss:.4f}")
            if held_out is not None:
                rate = (time.monotonic() - began) / max(1, done - first[0] + 1)
                left = f", about {duration(rate * (num_steps - done))} left" if done < num_steps else ""
                logger.info(f"step {done}/{num_steps}: held-out loss {held_out:.4f}{left}")

        self._line.begin("recovery")
        yield show
        self._line.end()

    def summary(self, results: Mapping[str, Any], folder: Path) -> None:
        """The content of results.json as tables; a missed target is shown again. The command's last lines follow."""
        self._line.close()
        if not self._brief:
            self.tables(results)
        if missed := told_miss(results):
            logger.info(f"{results['pruner']} {missed}")

    def tables(self, results: Mapping[str, Any]) -> None:
        """Scores against dense; for run.log, and shown where `verbose`, the zeros of each block with its losses."""
        self._line.close()
        width = self._terminal.width if self._terminal else PLAIN_WIDTH
        for table in sparsity_tables(results, PLAIN_WIDTH, box.MARKDOWN):
            self._log(table, shown=self._verbose)
        for table in result_tables(results, box.MARKDOWN):
            self._log(table)
        if self._terminal:
            zeros = sparsity_tables(results, width, box.SIMPLE_HEAD) if self._verbose else []
            self._terminal.print(*zeros, *result_tables(results, box.SIMPLE_HEAD))

    def _log(self, content: RenderableType, shown: bool = True) -> None:
        for line in as_text(content, PLAIN_WIDTH).splitlines():
            logger.info(line, extra={"shown": shown})


def next_steps(folder: Path, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(why, command, or where it is said) of what can be done with a finished run."""
    place = shlex.quote(str(folder))
    compared = ("compare", f"besa compare {shlex.quote(str(folder.parent))}")
    if not (folder / "model").is_dir():
        draw = ("draw", f"besa report {shlex.quote(str(folder.parent))}")
        if results.get("structure") or results.get("recovery") or not _rebuild(folder / "masks.safetensors"):
            return [compared, draw]
        model = shlex.quote(str(results.get("model", "DENSE")))
        return [
            compared,
            ("rebuild", f"besa masks apply {place}/masks.safetensors --model {model} --out {place}-model"),
        ]
    score = ("score it", f"besa evaluate {argument('checkpoint', str(folder))} evaluator=zero_shot")
    use = ("use it", f"{place}/model/README.md says how: transformers, lm-eval, vLLM, llama.cpp")
    return [("try it", f"besa generate {place}"), compared if results.get("zero_shot") else score, use]


def _rebuild(masks: Path) -> bool:
    """Whether these masks and the dense weights give the pruned model: no kept weight was changed."""
    if not masks.is_file():
        return False
    from besa_exp.checkpoints.files import masks_description  # with torch, which nothing else here needs

    try:
        return not masks_description(masks)["weights_updated"]
    except ConfigurationError:  # of another version
        return False


def _lines_to_stdout() -> logging.Handler:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_PlainLines())
    handler.addFilter(lambda record: getattr(record, "shown", True))
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
