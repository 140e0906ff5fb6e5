"""Scores over seeds: mean, sample standard deviation and number, for each model, measure, method and target."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from besa_exp.display.markdown import escaped, markdown_table
from besa_exp.display.missed_target import missed_by
from besa_exp.report.comparability import Entry
from besa_exp.report.methods import Method
from besa_exp.report.runs import Measure, RunRecord

DENSE = Method("dense")


@dataclass(frozen=True)
class Cell:
    """One method at one target. `spread` is the sample standard deviation, None for a single run; `measured` the mean
    measured sparsity; `apart` why it may not stand beside the other cells of its model and measure."""

    model: str
    measure: Measure
    method: Method
    target: float
    measured: float
    mean: float
    spread: float | None
    values: tuple[float, ...]
    runs: tuple[int, ...]
    apart: str

    @property
    def missed(self) -> bool:
        """Whether the mean measured sparsity is half a point or more off the target."""
        return self.method.pruner != DENSE.pruner and bool(missed_by(self.target, self.measured))

    @property
    def text(self) -> str:
        """The mean, the spread where there is one, and over how many runs."""
        mean, spread = {"zero_shot": (".4f", ".4f"), "reconstruction": (".3g", ".1g")}.get(
            self.measure.kind, (".3f", ".3f")
        )
        text = f"{self.mean:{mean}}"
        return text if self.spread is None else f"{text} ± {self.spread:{spread}} ({len(self.values)})"


def cells(runs: Sequence[RunRecord], judged: Sequence[Entry]) -> list[Cell]:
    """All cells, ordered by model, measure, method and target. A dense model that was scored beside a pruned one
    counts where no run of its own scored it."""
    groups: dict[tuple, list[Entry]] = {}
    own = {(runs[e.run].model, e.measure, e.apart) for e in judged if not e.dense and runs[e.run].method == DENSE}
    for entry in judged:
        run = runs[entry.run]
        if entry.dense and (run.model, entry.measure, entry.apart) in own:
            continue
        dense = entry.dense or run.method.pruner == DENSE.pruner
        method, target = (DENSE, 0.0) if dense else (run.method, round(run.target or 0.0, 6))
        groups.setdefault((run.model, entry.measure, method, target, entry.apart), []).append(entry)
    found = [_cell(key, group, runs) for key, group in groups.items()]
    return sorted(found, key=lambda c: (c.apart, c.model, measure_rank(c.measure), c.method.order, c.target))


def _cell(key: tuple, group: Sequence[Entry], runs: Sequence[RunRecord]) -> Cell:
    model, measure, method, target, apart = key
    values = tuple(entry.value for entry in group)
    measured = [0.0 if entry.dense else runs[entry.run].measured or 0.0 for entry in group]
    return Cell(
        model,
        measure,
        method,
        target,
        statistics.fmean(measured),
        statistics.fmean(values),
        statistics.stdev(values) if len(values) > 1 and method != DENSE else None,
        values,
        tuple(entry.run for entry in group),
        apart,
    )


def measure_rank(measure: Measure) -> tuple:
    """Perplexities, then means over tasks and tasks, then reconstruction losses."""
    kinds = ("perplexity", "zero_shot", "reconstruction")
    return kinds.index(measure.kind), not measure.name.startswith("mean of"), measure.name, measure.metric


def runs_csv(runs: Sequence[RunRecord]) -> str:
    """A row a run, a column each score; empty where there is none."""
    measures = sorted({score.measure for run in runs for score in run.scores}, key=measure_rank)
    fixed = ["folder", "status", "error", "model", "method", "pattern", "seed", "target_sparsity", "measured_sparsity"]
    after = ["calibration", "calibration_sha256", "prune_seconds", "prune_processor_seconds", "total_seconds"]
    after += ["peak_host_bytes", "git_commit", "target_missed", "parameters_left"]
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow([*fixed, *(f"{m.kind} {m.label}" for m in measures), *after])
    for run in runs:
        values = {score.measure: score.value for score in run.scores}
        about = [run.folder, run.status, run.error, run.model, run.method.label, run.pattern, run.seed, run.target]
        calibration = run.calibration
        facts = [calibration.get("name"), calibration.get("tokens_sha256")]
        facts += [run.seconds.get(part) for part in ("prune", "prune_processor", "total")]
        facts += [
            run.memory.get("host"),
            run.environment.get("git_commit"),
            run.missed if run.status == "done" else None,
            run.parameters.left if run.parameters else None,
        ]
        rows.writerow([*about, run.measured, *(values.get(measure) for measure in measures), *facts])
    return file.getvalue()


def markdown(runs: Sequence[RunRecord], found: Sequence[Cell], paper: str) -> str:
    """summary.md: a table for each model and measure, the paper's table, what stands apart, what did not finish."""
    done = sum(run.status == "done" for run in runs)
    lines = [
        "# Report",
        "",
        f"Finished runs: {done}; others: {len(runs) - done}. Mean ± sample standard deviation (runs).",
    ]
    compared = [cell for cell in found if not cell.apart]
    for model, measure in dict.fromkeys((cell.model, cell.measure) for cell in compared):
        chosen = [cell for cell in compared if (cell.model, cell.measure) == (model, measure)]
        kind = "" if measure.kind == "reconstruction" else f"{measure.kind.replace('_', '-')} "
        lines += ["", f"## {escaped(model)}: {kind}{escaped(measure.label)}", ""]
        lines += _matrix(chosen)
    lines += ["", "## The paper's table", "", paper, "", "## Not comparable", "", *_apart(found, runs)]
    return "\n".join([*lines, "", "## Not finished", "", *_unfinished(runs), ""])


def _matrix(chosen: Sequence[Cell]) -> list[str]:
    targets = sorted({cell.target for cell in chosen})
    rows = []
    for method in dict.fromkeys(cell.method for cell in chosen):
        own = {cell.target: cell for cell in chosen if cell.method == method}
        shown = (_with_measured(own[target]) if target in own else "" for target in targets)
        rows.append([escaped(method.label), *shown])
    return markdown_table(["method", *(f"{target:.4g}" for target in targets)], rows, numbers=True)


def _with_measured(cell: Cell) -> str:
    """The measured sparsity too, where it misses the target."""
    return cell.text + (f" at {cell.measured:.1%}" if cell.missed else "")


def _apart(found: Sequence[Cell], runs: Sequence[RunRecord]) -> list[str]:
    lines = []
    for cell in found:
        if cell.apart:
            name = f"{cell.model}, {cell.method.label}, {cell.target:.4g}: {cell.measure.label} {_with_measured(cell)}"
            lines.append(f"- {escaped(name)} ({escaped(runs[cell.runs[0]].folder)}): {escaped(cell.apart)}")
    return lines or ["All scores that were found are comparable."]


def _unfinished(runs: Sequence[RunRecord]) -> list[str]:
    lines = [
        f"- {escaped(run.folder)}: {run.status}" + (f": {escaped(run.error)}" if run.error else "")
        for run in runs
        if run.status != "done"
    ]
    return lines or ["All runs that were found are finished."]
