"""What a dry run shows: bytes by part and place, seconds by part, and whether it fits, with what to do where not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from besa_exp.display.console import PLAIN_WIDTH
from besa_exp.display.missed_target import out_of_reach
from besa_exp.display.progress import duration
from besa_exp.display.terminal import console_of
from besa_exp.dry_run.estimate import Estimate, estimate
from besa_exp.dry_run.parts import LIBRARIES, PHASES, Place, peak, remedies
from besa_exp.machine.disk import size_in_words
from besa_exp.settings import RunSettings

NOT = "does NOT fit"
NOT_ESTIMATED = "not estimated"


def show_estimates(jobs: Sequence[tuple[RunSettings, Path, bool]]) -> None:
    """Estimates of the jobs (settings, run folder, whether a finished run is there); of several a line each, and of a
    finished one no more than that. Jobs that differ in seed and sparsity alone are measured once."""
    out, progress = console_of(PLAIN_WIDTH), Console(stderr=True)
    known: dict[str, Estimate] = {}
    found: list[Estimate] = []
    done = [folder for _, folder, finished in jobs if finished] if len(jobs) > 1 else []
    for settings, folder, finished in jobs:
        if folder in done:
            continue
        kind = repr(_alike(settings))
        if kind not in known:
            known[kind] = estimate(settings, folder, lambda text: progress.print(f"{text} ...", style="dim"))
        found.append(replace(known[kind], settings=settings, folder=folder, finished=finished))
    out.print(estimate_tables(found[0]) if len(jobs) == 1 else sweep_table(found, done))


def _alike(settings: RunSettings) -> RunSettings:
    """The same for all settings that cost the same."""
    pruner = settings.pruner
    seeded = any(field.name == "seed" for field in fields(pruner))
    return replace(
        settings,
        seed=0,
        calibration=replace(settings.calibration, seed=0),
        pruner=replace(pruner, seed=0) if seeded else pruner,
        sparsity=0.5 if settings.sparsity else 0.0,
    )


def estimate_tables(found: Estimate) -> RenderableType:
    """Of one run."""
    return Group(_bytes_table(found), _seconds_table(found), Text("\n".join([*verdicts(found), *_remarks(found)])))


def sweep_table(jobs: Sequence[Estimate], done: Sequence[Path] = ()) -> RenderableType:
    """A line a job, and what they take one after the other: the most of the memory, the sum of the time and of what
    they keep; a dense model is scored once for all. `done`: folders of finished runs."""
    places: list[Place] = ["device", "host", "disk"] if any("device" in job.free for job in jobs) else ["host", "disk"]
    table = Table(box=box.SIMPLE, title="what the jobs need", title_justify="left")
    table.add_column("folder", overflow="fold")
    for head in (*places, "kept", "time"):
        table.add_column(head, justify="right", no_wrap=True)
    for folder in done:
        table.add_row(str(folder), *[""] * (len(places) + 1), "finished before")
    for job in jobs:
        sizes = [size_in_words(_peak(job, place)) for place in places]
        table.add_row(str(job.folder), *sizes, size_in_words(job.kept), _time(job.seconds["total"]))
    before = [sum(earlier.kept for earlier in jobs[:number]) for number in range(len(jobs))]
    most = {place: max((_peak(job, place) for job in jobs), default=0) for place in places}
    most["disk"] = max((_peak(job, "disk") + kept for job, kept in zip(jobs, before, strict=True)), default=0)
    kept = sum(job.kept for job in jobs)
    table.add_section()
    row = [*(size_in_words(most[place]) for place in places), size_in_words(kept), _time(sweep_seconds(jobs))]
    table.add_row("one after the other", *row, style="bold")
    lines = [f"{job.folder}: {line}" for job in jobs for line in verdicts(job) if NOT in line]
    notes = dict.fromkeys(note for job in jobs for note in _remarks(job))
    return Group(table, Text("\n".join([*lines, *notes, "note: jobs that run at once take their memory each"])))


def sweep_seconds(jobs: Sequence[Estimate]) -> float | None:
    """One job after the other; the scores of a dense model are shared."""
    total, scored = 0.0, set()
    for job in jobs:
        if job.seconds["total"] is None:
            return None
        scores = repr((job.settings.model, job.settings.evaluator))
        shared = job.settings.evaluator.dense and scores in scored
        total += job.seconds["total"] - (job.seconds["evaluate"] or 0.0) / 2 * shared
        scored.add(scores)
    return total


def verdicts(found: Estimate) -> list[str]:
    """A line for each place: whether what is free there holds the run, and the remedies where not."""
    named = found.settings.device_name
    device = found.device if named == "here" else named
    names = {"device": f"memory of {device}", "host": "memory of the host", "disk": "disk of the run folder"}
    lines = []
    for place, free in found.free.items():
        needed, phase = peak([part for part in found.parts if part.name != LIBRARIES], place)
        fits = needed <= free
        said = "fits" if fits else NOT
        line = f"{names[place]}: {said}: {size_in_words(needed)} more while it runs {phase}, {size_in_words(free)} free"
        cures = remedies(found.parts, place)
        lines.append(line if fits else "; ".join([line, *([f"try {', or '.join(cures)}"] if cures else [])]))
    return lines


def _bytes_table(found: Estimate) -> Table:
    places: list[Place] = ["device", "host", "disk"] if "device" in found.free else ["host", "disk"]
    table = Table(box=box.SIMPLE, title=f"{found.folder}: memory and disk", title_justify="left")
    table.add_column("part")
    for place in places:
        table.add_column(place, justify="right")
    table.add_column("during")
    for part in found.parts:
        shown = NOT_ESTIMATED if part.size is None else size_in_words(part.size)
        when = "all of it" if len(part.phases) == len(PHASES) else ", ".join(part.phases)
        table.add_row(part.name, *(shown if place == part.place else "" for place in places), when)
    table.add_section()
    peaks = [peak(found.parts, place) for place in places]
    phases = ", ".join(dict.fromkeys(phase for _, phase in peaks))
    table.add_row("at once, at most", *(size_in_words(size) for size, _ in peaks), phases, style="bold")
    table.add_row("kept in the end", *(size_in_words(found.kept) if place == "disk" else "" for place in places), "")
    return table


def _seconds_table(found: Estimate) -> Table:
    table = Table(box=box.SIMPLE, title="time", title_justify="left")
    table.add_column("part")
    table.add_column("", justify="right")
    for part, value in found.seconds.items():
        if part == "prune":
            table.add_row(f"prune: {found.blocks} blocks of {_time(found.seconds['one block'])}", _time(value))
        elif part not in ("one block", "total"):
            table.add_row(part, _time(value))
    table.add_section()
    table.add_row("total", _time(found.seconds["total"]), style="bold")
    return table


def _remarks(found: Estimate) -> list[str]:
    done = ["a finished run is there, which the command shows and leaves alone (overwrite=true prunes again)"]
    missed = [warning] if (warning := out_of_reach(found.settings)) else []
    return [f"note: {note}" for note in [*(done if found.finished else []), *missed, *found.notes]]


def _peak(found: Estimate, place: Place) -> int:
    return peak(found.parts, place)[0]


def _time(value: float | None) -> str:
    return NOT_ESTIMATED if value is None else duration(value)
