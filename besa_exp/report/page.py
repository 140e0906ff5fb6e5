"""One self-contained page: template, style, script, plotly and the data in a single HTML file that fetches nothing.

What the page knows is judged in Python: it only chooses and draws. The data is a JSON element whose `<`, `>` and `&`
are escaped, so that no text of a run (a name, an error) can end it or become markup; the script puts it into the page
as text only, and the page's own policy forbids every request.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from besa_exp import __version__
from besa_exp.report.comparability import RECONSTRUCTION
from besa_exp.report.comparison import main_measures
from besa_exp.report.curves import Curve, row_quantiles
from besa_exp.report.depth import allocation
from besa_exp.report.methods import Method, Style
from besa_exp.report.panels import usual_target
from besa_exp.report.paper import PaperTable, published
from besa_exp.report.read import Report
from besa_exp.report.runs import Measure, RunRecord
from besa_exp.report.summaries import DENSE, Cell, measure_rank

PARTS = Path(__file__).with_name("page_parts")
SCRIPTS = ("elements.js", "filters.js", "charts.js", "sections.js", "start.js")  # in the order they need each other
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
DIGITS = 5  # significant ones of a curve's values
SHOWN_OF_A_RUN = ("pattern", "command", "config", "environment", "calibration", "unavailable", "seconds", "memory")
SHOWN_OF_A_RUN += ("quantisation", "stages", "texts", "cost")


def page(data: Mapping[str, Any], title: str = "besa report") -> str:
    """The whole HTML. Needs plotly, whose JavaScript becomes part of the page."""
    from plotly.offline import get_plotlyjs

    script = "\n".join(_part(name) for name in SCRIPTS)
    return Template(_part("page.html")).substitute(
        title=html.escape(title),
        style=_part("page.css"),
        data=_json_element({key: value for key, value in data.items() if key != "details"}),
        details=_json_element(data.get("details", [])),
        plotly=get_plotlyjs(),
        script=f"(() => {{\n'use strict';\n{script}\n}})();",
    )


def _json_element(data: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
    for mark, escape in ESCAPES.items():
        text = text.replace(mark, escape)
    return text


def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


def page_data(report: Report) -> dict[str, Any]:
    """Methods, measures and environments are listed once and referred to by their number."""
    runs, found, errors = report.runs, report.cells, report.errors
    in_paper = (cell for table in report.tables for cell in table.cells if cell.model in published()["models"])
    of_the_paper = any(cell.ours is not None for cell in in_paper)  # a run is of one of its models
    done = [run for run in runs if run.status == "done"]
    methods = sorted({run.method for run in done} | {cell.method for cell in found}, key=lambda method: method.order)
    measures = sorted({s.measure for r in done for s in r.scores} | {c.measure for c in found}, key=measure_rank)
    main = main_measures([measure for measure in measures if measure != RECONSTRUCTION])
    numbered = [*enumerate(zip(runs, report.curves, strict=True))]
    return {
        "version": __version__,
        "places": list(report.places),
        "models": sorted({run.model for run in done}),
        "methods": _methods(methods, report.looks),
        "measures": [{"kind": m.kind, "label": m.label, "lower": m.lower, "main": m in main} for m in measures],
        "targets": sorted({_target(run) for run in done if run.method != DENSE}),
        "cells": [_cell(cell, runs, methods, measures) for cell in found],
        "depth": [asdict(error) | {"method": methods.index(error.method)} for error in errors],
        "depth_target": usual_target([(error.target, error.method) for error in errors]) if errors else None,
        "paper": [_paper(table) for table in report.tables] if of_the_paper else [],
        "others": published()["others"],
        "runs": [_run(number, run, curve, methods, measures) for number, (run, curve) in numbered],
        "details": [_details(run, curve) for _, (run, curve) in numbered],
    }


def _target(run: RunRecord) -> float:
    return round(float(run.target or 0.0), 6)


def _methods(methods: Sequence[Method], looks: Mapping[Method, Style]) -> list[dict[str, Any]]:
    return [
        {"label": method.label, "pruner": method.pruner}
        | {"light": looks[method].light, "dark": looks[method].dark, "symbol": looks[method].symbol}
        for method in methods
    ]


def _cell(
    cell: Cell, runs: Sequence[RunRecord], methods: Sequence[Method], measures: Sequence[Measure]
) -> dict[str, Any]:
    referred = {"measure": measures.index(cell.measure), "method": methods.index(cell.method)}
    seeds = [runs[number].seed for number in cell.runs]
    return vars(cell) | referred | {"missed": cell.missed, "text": cell.text, "seeds": seeds}


def _paper(table: PaperTable) -> dict[str, Any]:
    rows = [
        {"name": name, "pruner": pruner, "cells": [*map(asdict, own)]} for (name, pruner), own in table.rows.items()
    ]
    return {"title": table.title, "source": table.source, "kind": table.kind, "models": table.models, "rows": rows}


def _run(
    number: int, run: RunRecord, curve: Curve, methods: Sequence[Method], measures: Sequence[Measure]
) -> dict[str, Any]:
    """What tables and filters need of a run; the rest is in its details."""
    row = {"id": number, "folder": run.folder, "status": run.status, "error": run.error}
    if run.status != "done":
        return row
    return row | {
        "model": run.model,
        "method": methods.index(run.method),
        "seed": run.seed,
        "target": _target(run),
        "measured": run.measured,
        "missed": run.missed,
        "scores": [[measures.index(score.measure), score.value] for score in run.scores],
        "seconds": run.seconds.get("prune"),
        "searched": bool(curve.points),
        "left": run.parameters.left / run.parameters.dense if run.parameters else None,
    }


def _details(run: RunRecord, curve: Curve) -> str:
    """What the page shows of one run alone, as JSON of its own: it is read when the run is looked at."""
    if run.status != "done":
        return "{}"
    details = {
        **{name: getattr(run, name) for name in SHOWN_OF_A_RUN},
        "recovery_curve": _recovery(curve),
        "simulated_speed": run.simulated_speed,
        "blocks": [
            [b.index, *map(_rounded, (b.loss_before, b.loss_after, b.seconds))] for b in run.blocks if run.prunes
        ],
        "allocation": asdict(allocation(run)),
        "rows": row_quantiles(run.path),
        "curve": {"stride": curve.stride, "blocks": _curve(curve)},
    }
    return json.dumps(details, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)


def _recovery(curve: Curve) -> dict[str, Any]:
    steps, losses, held_out = [list(part) for part in zip(*curve.recovery, strict=True)] or ([], [], [])
    return {"steps": steps, "loss": [*map(_rounded, losses)], "held_out": [v and _rounded(v) for v in held_out]}


def _curve(curve: Curve) -> list[dict[str, Any]]:
    blocks: dict[int, list[Sequence[float]]] = {}
    for block, *point in curve.points:
        blocks.setdefault(block, []).append(point)
    found = []
    for block, points in blocks.items():
        steps, *series = zip(*points, strict=True)
        named = zip(("loss", "reconstruction", "expected"), series, strict=True)
        found.append({"block": block, "steps": steps} | {name: [*map(_rounded, values)] for name, values in named})
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
