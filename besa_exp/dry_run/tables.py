"""What a dry run shows: bytes by part and place, seconds by part, and whether it fits, with what to do where not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from besa_exp.display.console import PLAIN_WIDTH
from besa_exp.display.missed_target import out_of_reach
from besa_exp.display.progress import duration
from besa_exp.display.terminal import console_of
from besa_exp.dry_run.estimate import LIBRARIES, PHASES, Estimate, Place, estimate, peak, remedies
from besa_exp.machine.disk import size_in_words
from besa_exp.settings import RunSettings

NOT = "does NOT fit"


def show_estimates(jobs: Sequence[tuple[RunSettings, Path, bool]]) -> None:
    """Estimates of the jobs (settings, run folder, whether a finished run is there); of several a line each, and of a
    finished one no more than that. Jobs that differ in seed and sparsity alone are measured once."""
    progress, known, found = Console(stderr=True), dict[str, Estimate](), list[Estimate]()
    done = [folder for _, folder, finished in jobs if finished and len(jobs) > 1]
    for settings, folder, finished in jobs:
        if folder in done:
            continue
        kind = re.sub(r"\bseed=\d+", "", repr(replace(settings, sparsity=0.5 if settings.sparsity else 0.0)))
        if kind not in known:
            progress.print("working out what the run needs ...", style="dim")
            known[kind] = estimate(settings, folder)
        found.append(replace(known[kind], settings=settings, folder=folder, finished=finished))
    console_of(PLAIN_WIDTH).print(estimate_tables(found[0]) if len(jobs) == 1 else sweep_table(found, done))


def estimate_tables(found: Estimate) -> RenderableType:
    """Of one run."""
    places: list[Place] = [*found.free]
    rows: list[list[str]] = []
    for part in found.parts:
        if part.place in places:
            when = "whole run" if part.phases == PHASES else ", ".join(part.phases)
            rows.append([part.name, *(_size(part.size) if place == part.place else "" for place in places), when])
    sizes, phases = zip(*(peak(found.parts, place) for place in places), strict=True)
    most = ["peak", *map(_size, sizes), ", ".join(dict.fromkeys(phases))]
    kept = ["left on disk", *(_size(found.kept) if place == "disk" else "" for place in places)]
    times = [[part, _time(value)] for part, value in found.seconds.items() if value != 0]
    for row in times:
        if row[0] == "refine":
            row[0] = "prune: the search over all blocks"
        elif row[0] == "prune":
            row[0] += f": {found.blocks} blocks of {_time(found.seconds['prune'] / found.blocks)}"
    table = _table(f"{found.folder}: memory and disk", ["part", *places, "during"], rows, [most, kept])
    remarks = Text("\n".join([*verdicts(found), *_remarks(found)]))
    return Group(table, _table("time", ["part", ""], times[:-1], times[-1:]), remarks)


def sweep_table(jobs: Sequence[Estimate], done: Sequence[Path] = ()) -> RenderableType:
    """A line a job, and what they take one after the other: the most of the memory, the sum of the time and of what
    they keep; a dense model is scored once for all. `done`: folders of finished runs."""
    places: list[Place] = [*max((job.free for job in jobs), key=len, default={})]
    rows = [[str(folder), *[""] * (len(places) + 1), "finished before"] for folder in done]
    most, kept, seconds, scored = dict.fromkeys(places, 0.0), 0.0, 0.0, set()
    for job in jobs:
        needed = {place: peak(job.parts, place)[0] for place in places}
        most = {place: max(most[place], needed[place] + kept * (place == "disk")) for place in places}
        rows.append([str(job.folder), *map(_size, [*needed.values(), job.kept]), _time(job.seconds["total"])])
        scores = repr((job.settings.model, job.settings.evaluator))
        shared = job.settings.evaluator.dense and scores in scored
        seconds += job.seconds["total"] - job.seconds["evaluate"] / 2 * shared
        kept += job.kept
        scored.add(scores)
    summed = ["one after the other", *map(_size, [*most.values(), kept]), _time(seconds)]
    table = _table("what the jobs need", ["folder", *places, "kept", "time"], rows, [summed])
    lines = [f"{job.folder}: {line}" for job in jobs for line in verdicts(job) if NOT in line]
    notes = dict.fromkeys(note for job in jobs for note in _remarks(job))
    return Group(
        table, Text("\n".join([*lines, *notes, "note: each job that runs at the same time takes its own memory"]))
    )


def verdicts(found: Estimate) -> list[str]:
    """A line for each place: whether what is free there holds the run, and the remedies where not."""
    names = {"device": f"memory of {found.device}", "host": "memory of the host", "disk": "disk of the run folder"}
    more, lines = [part for part in found.parts if part.name != LIBRARIES], []
    for place, free in found.free.items():
        needed, phase = peak(more, place)
        cures = f"; try {', or '.join(named)}" if needed > free and (named := remedies(found.parts, place)) else ""
        said = f"{'fits' if needed <= free else NOT}: peak {_size(needed)} during {phase}, {_size(free)} free"
        lines.append(f"{names[place]}: {said}{cures}")
    return lines


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], totals: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head in ("part", "folder", "during") else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    table.add_section()
    for row in totals:
        table.add_row(*row, style="bold")
    return table


def _remarks(found: Estimate) -> list[str]:
    done = ["this run is finished: the command will only show it (overwrite=true prunes again)"]
    notes = [*done * found.finished, *filter(None, [out_of_reach(found.settings)]), *found.notes]
    return [f"note: {note}" for note in notes]


def _size(value: float) -> str:
    return "not estimated" if isnan(value) else size_in_words(round(value))


def _time(value: float) -> str:
    return "not estimated" if isnan(value) else duration(value)
