"""One table a model: a row for each method and target, sorted by score, with what was lost against the dense model.

The same rows are what `besa compare` prints, a sweep closes with, and LaTeX and CSV hold. Scores that may not stand
beside the others of their model have rows of their own below, with the reason, and are never ranked.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from besa_exp.evaluation.score import PREFERRED
from besa_exp.report.comparability import RECONSTRUCTION, entries
from besa_exp.report.methods import Method
from besa_exp.report.runs import Measure, RunRecord
from besa_exp.report.summaries import DENSE, Cell, cells, measure_rank

COSTS = ("parameters_left", "flops_per_token", "cache_bytes_per_token", "decode_tokens_per_second")  # at batch 1
BY = ("score", "method", "target", "measured", "time")  # what rows can be sorted by, besides a measure's label


@dataclass(frozen=True)
class Row:
    """One method at one target over `runs` runs; `seconds` is the mean pruning time; `cost` {one of COSTS: the mean
    over the runs that know it}; `apart` as a cell's."""

    method: Method
    target: float
    measured: float
    missed: bool
    scores: Mapping[Measure, Cell]
    seconds: float | None
    runs: int
    cost: Mapping[str, float]
    apart: str = ""


@dataclass(frozen=True)
class Comparison:
    """The rows of one model, the comparable ones first, and the dense model's scores."""

    model: str
    measures: tuple[Measure, ...]
    dense: Mapping[Measure, Cell]
    rows: tuple[Row, ...]

    def place(self, row: Row, measure: Measure) -> int:
        """0 for the best score at the row's target, 1 for the second, ...; -1 where there is nothing to rank, as where
        the target was missed: fewer zeros are no better method."""
        fair = [r for r in self.rows if measure in r.scores and not (r.apart or r.missed)]
        rivals = [r for r in fair if r.target == row.target]
        if row not in rivals or len(rivals) < 2:
            return -1
        sign = 1 if measure.lower else -1
        own = sign * row.scores[measure].mean
        return sum(sign * rival.scores[measure].mean < own for rival in rivals)


def lost(measure: Measure, value: float, dense: float) -> float:
    """What was lost against the dense model: relative (0.24 is 24 % more perplexity), of an accuracy in itself."""
    if measure.kind == "zero_shot":
        return value - dense if measure.lower else dense - value
    return value / dense - 1 if dense else 0.0


def compare(runs: Sequence[RunRecord], by: str = "score") -> list[Comparison]:
    """A comparison for each model of the finished runs, in the order of their names."""
    found = cells(runs, entries(runs))
    models = sorted({cell.model for cell in found})
    return [_of_model(model, [cell for cell in found if cell.model == model], runs, by) for model in models]


def _of_model(model: str, found: Sequence[Cell], runs: Sequence[RunRecord], by: str) -> Comparison:
    scored = [cell for cell in found if cell.measure != RECONSTRUCTION] or list(found)
    covered = Counter(cell.measure for cell in scored if cell.method != DENSE)
    chosen = main_measures([cell.measure for cell in scored])  # of a kind the one that most rows have stands first
    measures = tuple(sorted(chosen, key=lambda measure: (*measure_rank(measure)[:2], -covered[measure])))
    dense = {cell.measure: cell for cell in scored if cell.method == DENSE and not cell.apart}
    groups: dict[tuple[Method, float, str], list[Cell]] = {}
    for cell in scored:
        if cell.measure in measures and cell.method != DENSE:
            groups.setdefault((cell.method, cell.target, cell.apart), []).append(cell)
    rows = [_row(own, runs) for own in groups.values()]
    return Comparison(model, measures, dense, tuple(_sorted(rows, measures, by)))


def _row(own: Sequence[Cell], runs: Sequence[RunRecord]) -> Row:
    first = own[0]
    members = dict.fromkeys(number for cell in own for number in cell.runs)
    times = [seconds for number in members if (seconds := runs[number].seconds.get("prune")) is not None]
    scores = {cell.measure: cell for cell in own}
    seconds = statistics.fmean(times) if times else None
    facts = first.method, first.target, first.measured, first.missed
    return Row(*facts, scores, seconds, len(members), _cost([runs[number] for number in members]), first.apart)


def _cost(runs: Sequence[RunRecord]) -> dict[str, float]:
    known = {
        "parameters_left": [run.parameters.left / run.parameters.dense for run in runs if run.parameters],
        **{key: [run.costs[key] for run in runs if key in run.costs] for key in COSTS[1:-1]},
        COSTS[-1]: [run.costs[COSTS[-1]]["1"] for run in runs if COSTS[-1] in run.costs],
    }
    return {key: statistics.fmean(values) for key, values in known.items() if values}


def _sorted(rows: Sequence[Row], measures: Sequence[Measure], by: str) -> list[Row]:
    """What stands apart comes last, and a row without the value after those that have it."""
    named = {measure.label: measure for measure in measures}
    measure = named.get(by) or (measures[0] if measures else None)

    def score(row: Row) -> tuple[bool, float]:
        cell = row.scores.get(measure) if measure else None
        if cell is None or measure is None:
            return True, 0.0
        return False, cell.mean if measure.lower else -cell.mean

    keys = {
        "method": lambda row: (row.method.order, row.target),
        "target": lambda row: (row.target, row.method.order),
        "measured": lambda row: (row.measured, score(row)),
        "time": lambda row: (row.seconds is None, row.seconds or 0.0),
        "score": lambda row: (row.target, score(row)),
    }
    key = keys.get(by, score)
    return sorted(rows, key=lambda row: (bool(row.apart), key(row)))


def main_measures(measures: Sequence[Measure]) -> tuple[Measure, ...]:
    """Each once, in their order; of a task's metrics the one that stands for it (acc_norm, acc, or its first)."""
    preferred = [key.partition(",")[0] for key in PREFERRED]
    chosen: dict[tuple[str, str], Measure] = {}
    for measure in sorted(set(measures), key=measure_rank):
        known = chosen.setdefault((measure.kind, measure.name), measure)
        ranks = [preferred.index(m.metric) if m.metric in preferred else len(preferred) for m in (measure, known)]
        if measure.kind == "zero_shot" and ranks[0] < ranks[1]:
            chosen[measure.kind, measure.name] = measure
    return tuple(chosen.values())
