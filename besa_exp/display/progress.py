"""One progress line for every long stage of a run: what is going on, how far it is, the time left.

On a terminal a line of rich's at the bottom of the screen; a stage that ends becomes a line above it with its time.
Elsewhere nothing: what is worth keeping is logged by the console.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from besa_exp.blocks.reports import BlockReport, Step

NARROW = 80  # columns, below which the bar is short


class StageLine:
    """The stage under way on `terminal`; None: nobody watches. `brief`: ended stages leave no line."""

    def __init__(self, terminal: Console | None, brief: bool = False):
        self._terminal, self._brief = terminal, brief
        self._bars: Progress | None = None
        self._text, self._began, self._first = "", 0.0, (0.0, 0)

    def begin(self, text: str) -> None:
        """Ends the stage before, and shows this one, of which it is not known how far it is."""
        self.end()
        self._text, self._began, self._first = text, time.monotonic(), (0.0, 0)
        if self._terminal is None:
            return
        if self._bars is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=16 if self._terminal.width < NARROW else 32),
                TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            )
            self._bars = Progress(*columns, console=self._terminal, transient=True)
            self._bars.start()
        self._task = self._bars.add_task(_short(text, self._terminal.width), total=None, note="")

    def count(self, done: int, total: int, of: str) -> None:
        """`done` of `total` windows, questions, ...; the time left from the second time on."""
        now = time.monotonic()
        if self._first[1] == 0:
            self._first = (now, done)
        since, before = self._first
        left = (now - since) * (total - done) / (done - before) if done > before else None
        self.show(done / max(total, 1), f"{done:,} of {total:,} {of}" + (f" · {about(left)}" if left else ""))

    def show(self, share: float, note: str) -> None:
        """How far the stage is, in [0, 1], and what stands behind the bar."""
        if self._bars:
            self._bars.update(self._task, total=1.0, completed=min(1.0, share), note=note)

    def end(self, well: bool = True) -> None:
        """The stage is over: a line says how long it took."""
        if self._bars and self._text:
            self._bars.remove_task(self._task)
            if self._terminal and not (self._brief and well):
                mark, style = ("✓", "green") if well else ("✗", "red")
                took = duration(time.monotonic() - self._began)
                self._terminal.print(Text.assemble((mark, style), f" {self._text}  ", (took, "dim")))
        self._text = ""

    def close(self, well: bool = True) -> None:
        """Ends the stage and takes the line from the screen."""
        self.end(well)
        if self._bars:
            self._bars.stop()
            self._bars = None


@dataclass
class PruningProgress:
    """Follows the blocks of one walk: `num_blocks` in all, of which `seconds_before` lists those pruned before.

    The time left is known from the first step on where a block's steps are, else from the second block on; right away
    where an earlier attempt has measured how long a block takes."""

    num_blocks: int
    seconds_before: Sequence[float]
    steps_per_block: int | None
    line: StageLine
    log: Callable[[str], None]
    _seconds: list[float] = field(default_factory=list)
    _steps: int = 0
    _began: float = 0.0

    def __post_init__(self) -> None:
        self._seconds, self._began = list(self.seconds_before), time.monotonic()
        self._show("")

    def step(self, step: Step) -> None:
        self._steps += 1
        known = f" of {self.steps_per_block}" if self.steps_per_block else ""
        self._show(f" · step {self._steps}{known} · loss {step.loss:.3g}")

    def block(self, report: BlockReport) -> None:
        self.steps_per_block = self._steps or self.steps_per_block
        self._seconds.append(time.monotonic() - self._began)
        self._steps, done = 0, len(self._seconds)
        self._began = time.monotonic()
        left = self.time_left()
        dense = f" (index {report.index} of the dense model)" if report.index + 1 != done else ""
        started = f" ({report.loss_before:.4g} at the start)" if report.loss_before != report.loss_after else ""
        self.log(
            f"block {done} of {self.num_blocks}{dense}: sparsity {report.sparsity:.4f}, "
            f"reconstruction loss {report.loss_after:.4g}{started}, "
            f"{duration(report.seconds)}" + (f", {about(left)}" if left else "")
        )
        self._show(f" · loss {report.loss_after:.3g}")

    def time_left(self) -> float | None:
        """Seconds; None where nothing is known yet, or nothing is left."""
        elapsed, within = time.monotonic() - self._began, self._within()
        left = self.num_blocks - len(self._seconds)
        if self._seconds:
            mean = sum(self._seconds) / len(self._seconds)
            return max(0.0, left * mean - min(elapsed, mean)) if left else None
        return elapsed / within * (left - within) if within > 0 else None

    def _within(self) -> float:
        return min(1.0, self._steps / self.steps_per_block) if self.steps_per_block else 0.0

    def _show(self, more: str) -> None:
        left = self.time_left()
        at = min(len(self._seconds) + 1, self.num_blocks)
        ending = f" · {about(left)}" if left else ""
        share = (len(self._seconds) + self._within()) / max(1, self.num_blocks)
        self.line.show(share, f"block {at} of {self.num_blocks}{ending}{more}")


def duration(seconds: float) -> str:
    """`12.3 s`, `3 min 20 s`, `1 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def about(seconds: float) -> str:
    """`about 40 s left`: no more exact than it is known."""
    return f"about {round(seconds)} s left" if seconds < 59.5 else f"about {duration(seconds)} left"


def _short(text: str, width: int) -> str:
    most = max(12, width // 3)
    return text if len(text) <= most else f"{text[: most - 1]}…"
