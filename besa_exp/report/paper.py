"""The paper's table beside ours: what it published, what our runs give under its conditions, and the difference.

The published figures are in published.json with their source. A cell that is not there is not known to us, and says
so; a run that was not calibrated as the paper's were is shown with that remark.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from besa_exp.display.markdown import escaped, markdown_table
from besa_exp.report.runs import Measure, RunRecord
from besa_exp.report.summaries import Cell

NOT_KNOWN, NOT_IN_PAPER, NOT_RUN = "not known to us", "not in the paper", "not run"
WINDOW, CALIBRATION = "2048 tokens", ("c4", 128, 2048)  # the paper's conditions


@dataclass(frozen=True)
class PaperCell:
    """`paper` is a number, or why there is none; `ours` and `difference` are None where there is no run."""

    row: str
    pruner: str
    model: str
    paper: float | str
    ours: float | None
    spread: float | None
    number: int
    difference: float | None
    remark: str


@dataclass(frozen=True)
class PaperTable:
    """One measure: a cell for each row and model, the paper's models first."""

    title: str
    kind: str
    source: str
    cells: tuple[PaperCell, ...]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(cell.model for cell in self.cells))

    @property
    def rows(self) -> dict[tuple[str, str], list[PaperCell]]:
        """{(row, pruner): a cell for each of `models`}."""
        rows: dict[tuple[str, str], list[PaperCell]] = {}
        for cell in self.cells:
            rows.setdefault((cell.row, cell.pruner), []).append(cell)
        return rows


@cache
def published() -> Mapping[str, Any]:
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def paper_tables(runs: Sequence[RunRecord], found: Sequence[Cell]) -> list[PaperTable]:
    """A table for each measure of the paper, then one for each other measure of the runs, without a paper's column."""
    data = published()
    measures = {Measure(m["kind"], m["name"], m.get("metric", "")): m["title"] for m in data["measures"]}
    own = [cell for cell in found if not cell.apart and cell.measure.kind != "reconstruction"]
    others = dict.fromkeys(cell.measure for cell in own if cell.measure not in measures)
    tables = [_table(measure, title, runs, own, True) for measure, title in measures.items()]
    return tables + [_table(measure, f"{measure.label} (ours)", runs, own, False) for measure in others]


def _table(measure: Measure, title: str, runs: Sequence[RunRecord], own: Sequence[Cell], in_paper: bool) -> PaperTable:
    data = published()
    sparsities = (0.0, data["sparsity"])
    cells = [cell for cell in own if cell.measure == measure and cell.target in sparsities]
    known = data["cells"].get(measure.name, {"source": "", "columns": [], "values": {}})
    ours = [model for model in dict.fromkeys(cell.model for cell in cells) if paper_name(model) is None]
    rows = [
        _cell(row, model, model in data["models"] and in_paper, known, cells, runs)
        for row in data["rows"]
        for model in [*(data["models"] if in_paper else []), *ours]
    ]
    source = f"{data['source']}; {known['source']}; {data['conditions']}" if known["source"] else data["source"]
    return PaperTable(title, measure.kind, source if in_paper else "", tuple(rows))


def _cell(
    row: Mapping[str, Any],
    model: str,
    in_paper: bool,
    known: Mapping[str, Any],
    cells: Sequence[Cell],
    runs: Sequence[RunRecord],
) -> PaperCell:
    values = known["values"].get(row["name"], [])
    at = known["columns"].index(model) if model in known["columns"] else None
    value = values[at] if at is not None and at < len(values) else None
    paper: float | str = value if value is not None else NOT_KNOWN if in_paper else NOT_IN_PAPER
    mine = next(
        (cell for cell in cells if (paper_name(cell.model) or cell.model) == model and _is_row(cell, row, runs)), None
    )
    if mine is None:
        return PaperCell(row["name"], row["pruner"], model, paper, None, None, 0, None, "")
    difference = mine.mean - value if value is not None else None
    remark = _remark(mine, runs) if in_paper else ""
    return PaperCell(
        row["name"], row["pruner"], model, paper, mine.mean, mine.spread, len(mine.values), difference, remark
    )


def paper_name(model: str) -> str | None:
    """What the paper calls the model; None where it is not in the paper."""
    return next((name for name, known in published()["models"].items() if model.lower() in known), None)


def _is_row(cell: Cell, row: Mapping[str, Any], runs: Sequence[RunRecord]) -> bool:
    """Whether the cell's method is the row's: its pruner, granularity and an unstructured pattern."""
    run = runs[cell.runs[0]]
    given = run.config.get("pruner")
    settings = given if isinstance(given, Mapping) else {}
    same = all(settings.get(key, value) == value for key, value in row.get("settings", {}).items())
    dense = cell.method.pruner == "dense"
    return cell.method.pruner == row["pruner"] and (dense or (same and run.pattern == "unstructured"))


def _remark(cell: Cell, runs: Sequence[RunRecord]) -> str:
    """In what the run's conditions are not the paper's."""
    run = runs[cell.runs[0]]
    calibration = run.calibration
    used = (calibration.get("name"), calibration.get("num_samples"), calibration.get("seq_len"))
    remarks = []
    if cell.method.pruner != "dense" and used != CALIBRATION:
        remarks.append(f"calibrated on {used[1]} x {used[2]} tokens of {used[0]}")
    if cell.measure.kind == "perplexity":
        windows = {s.facets["evaluation window"] for s in (*run.scores, *run.dense_scores) if s.measure == cell.measure}
        remarks += [f"windows of {window}" for window in sorted(windows - {WINDOW})]
    remarks += [f"at {cell.measured:.1%}"] if cell.missed else []
    if cell.method.variant:
        remarks.append(cell.method.variant)
    return "; ".join(remarks)


def paper_markdown(tables: Sequence[PaperTable]) -> str:
    """The tables of measures that the paper or a run has a number for, as `paper / ours (difference)`."""
    lines: list[str] = []
    for table in tables:
        if not any(isinstance(cell.paper, float) or cell.ours is not None for cell in table.cells):
            continue
        lines += [f"### {escaped(table.title)}", "", f"Paper / ours (difference). {table.source}".rstrip(), ""]
        rows = [[*of, *(_shown(cell, table.kind) for cell in cells)] for of, cells in table.rows.items()]
        lines += [*markdown_table(["row", "ours", *map(escaped, table.models)], rows), ""]
    return "\n".join(lines)


def _shown(cell: PaperCell, kind: str) -> str:
    digits = 2 if kind == "perplexity" else 4
    paper = cell.paper if isinstance(cell.paper, str) else f"{cell.paper:.{digits}f}"
    if cell.ours is None:
        return f"{paper} / {NOT_RUN}"
    difference = "" if cell.difference is None else f" ({cell.difference:+.{digits}f})"
    return f"{paper} / {cell.ours:.{digits}f}{difference}" + (f", {escaped(cell.remark)}" if cell.remark else "")
