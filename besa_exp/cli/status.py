"""`besa status DIR...`: what runs, what failed and why, what is left. No torch, no Hydra."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from besa_exp.display.progress import duration
from besa_exp.display.terminal import console_of, counted
from besa_exp.report.folders import find_runs
from besa_exp.report.runs import RunRecord, read_run
from besa_exp.run_folder.folder import metric_lines
from besa_exp.run_folder.status import KILLED, read_status

PLAIN_WIDTH = 160
DESCRIPTION = """\
Shows for each run folder whether it is running, done, failed (with the error) or interrupted, and how far it got.
The exit code is 1 if a run failed."""
ORDER = ("running", "failed", "unreadable", "interrupted", "interrupted (killed)", "done")
STYLES = {"running": "cyan", "failed": "red", "unreadable": "red", "done": "green"}


def status(arguments: Sequence[str]) -> int:
    """Prints a line a run that is not done, and the counts; 1 where one failed."""
    parser = argparse.ArgumentParser(prog="besa status", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("places", nargs="*", default=["outputs"], metavar="DIR", help="run folders, sweeps, patterns")
    parser.add_argument("--all", action="store_true", help="list finished runs too, one line each")
    asked = parser.parse_args(arguments)
    runs = [read_run(folder) for folder in find_runs(asked.places)]
    console = console_of(PLAIN_WIDTH)
    for part in status_tables(runs, everything=asked.all):
        console.print(part, soft_wrap=isinstance(part, Text))  # a command can be copied as it stands
    return int(any(run.status in ("failed", "unreadable") for run in runs))


def status_tables(runs: Sequence[RunRecord], everything: bool = False) -> list[RenderableType]:
    """The counts, then a table of the runs that are not done (of all with `everything`), and how to go on."""
    counts = counted(sorted((run.status for run in runs), key=_order))
    parts: list[RenderableType] = [Text(f"{len(runs)} run{'' if len(runs) == 1 else 's'}: {counts}", style="bold")]
    listed = sorted((r for r in runs if everything or r.status != "done"), key=lambda r: (_order(r.status), r.folder))
    if listed:
        known: dict[str, int] = {}  # as finished runs say; a structure may have left some of them with fewer
        for run in runs:
            if run.blocks:
                known[run.model] = max(known.get(run.model, 0), len(run.blocks))
        parts.append(_table(listed, known))
    left = [run for run in runs if run.status not in ("done", "running")]
    if left:
        parts.append(Text(f"{len(left)} left. Run the same commands again to finish them, for example:"))
        parts.append(Text(f"  {left[0].command or f'besa_exp.prune(..., out={left[0].folder!r})'}"))
    return parts


def _order(state: str) -> int:
    return ORDER.index(state) if state in ORDER else len(ORDER)


def _table(runs: Sequence[RunRecord], blocks: dict[str, int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    heads = ("status", "run", "blocks", "took", *(["what happened"] if any(run.error for run in runs) else []))
    for head in heads:
        table.add_column(head, overflow="fold", no_wrap=head in ("blocks", "took"))
    names = Counter(run.path.name for run in runs)
    for run in runs:
        name = run.path.name if names[run.path.name] == 1 else run.folder
        facts = read_status(run.path) or {}
        state = Text(run.status, style=STYLES.get(run.status, "yellow"))
        error = " ".join(str(run.error or "").split()).removeprefix("RunError: ")
        took = "" if run.status == KILLED else _took(facts)
        cells = (state, Text(name), _progress(run, blocks), took, Text(error))
        table.add_row(*cells[: len(heads)])
    return table


def _progress(run: RunRecord, blocks: dict[str, int]) -> str:
    """`3 of 5`; without a finished run of the same model the number alone; nothing of a run that prunes none."""
    if run.status == "done":
        return str(len(run.blocks))
    if not run.prunes:
        return ""
    pruned = set()
    with suppress(OSError):
        pruned = {line.get("block") for line in metric_lines(run.path, "block")}
    return f"{len(pruned)} of {blocks[run.model]}" if run.model in blocks else str(len(pruned) or "")


def _took(facts: dict[str, Any]) -> str:
    """From the start of the last attempt to its end, or to now."""
    try:
        began = datetime.fromisoformat(facts["started"])
        ended = datetime.fromisoformat(facts["finished"]) if facts.get("finished") else datetime.now(UTC)
    except (KeyError, TypeError, ValueError):
        return ""
    return duration(max(0.0, (ended - began).total_seconds()))
