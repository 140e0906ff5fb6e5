"""Figures as PNG and PDF, for papers and READMEs: the page's charts without its choices.

One legend a figure stands below its panels (`panels.py`), never on a point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from besa_exp.report.comparison import Comparison
from besa_exp.report.curves import Curve
from besa_exp.report.depth import ErrorAlongDepth
from besa_exp.report.methods import Method, Style, looks
from besa_exp.report.panels import (
    Looks,
    Panel,
    allocation_panels,
    curve_panels,
    delta_panels,
    error_panels,
    pareto_panels,
    score_panels,
)
from besa_exp.report.runs import RunRecord
from besa_exp.report.summaries import DENSE, Cell

COLUMNS = 3
LABEL = 0.16  # inches: half of a last tick's label
LETTERS = 12  # of a legend's, an inch
LOOK = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "axes.edgecolor": "#6b7280",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "pdf.fonttype": 42,
}


def draw(
    folder: Path,
    runs: Sequence[RunRecord],
    curves: Sequence[Curve],
    found: Sequence[Cell],
    errors: Sequence[ErrorAlongDepth],
    comparisons: Sequence[Comparison] = (),
) -> list[Path]:
    """Every figure there is data for, written into `folder`; the files. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    known = looks_of(runs, found)
    with mpl.rc_context(LOOK):  # pyright: ignore[reportArgumentType] - its keys are a union of literals
        panels = panels_of(runs, curves, found, errors, comparisons, known)
        return [path for name, drawn in panels.items() if drawn for path in _save(folder, name, drawn, known)]


def looks_of(runs: Sequence[RunRecord], found: Sequence[Cell]) -> dict[Method, Style]:
    """Of every method that a report shows anywhere."""
    return looks({run.method for run in runs} | {cell.method for cell in found} | {DENSE})


def panels_of(
    runs: Sequence[RunRecord],
    curves: Sequence[Curve],
    found: Sequence[Cell],
    errors: Sequence[ErrorAlongDepth],
    comparisons: Sequence[Comparison],
    known: Looks,
) -> dict[str, list[Panel]]:
    """The panels of each figure, by its file's name."""
    compared = [cell for cell in found if not cell.apart]
    return {
        "perplexity": score_panels(compared, "perplexity", known),
        "zero_shot": score_panels(compared, "zero_shot", known),
        "delta_to_dense": delta_panels(comparisons, known),
        "time_against_score": pareto_panels(comparisons, known),
        "reconstruction": error_panels(errors, known),
        "allocation": allocation_panels(runs),
        "loss_curves": curve_panels(runs, curves),
    }


def figure_of(panels: Sequence[Panel], known: Looks) -> Any:
    """The figure, its legend below the panels."""
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    heights = [max(panel.height for panel in panels[row * columns :][:columns]) for row in range(rows)]
    widths = [max(panel.width for panel in panels[column::columns]) for column in range(columns)]
    width = sum(widths)
    methods = sorted({method for panel in panels for method in panel.methods}, key=lambda method: method.order)
    in_a_row = max(1, int(width * LETTERS // max([len(method.label) + 7 for method in methods], default=1)))
    legend = 0.2 * math.ceil(len(methods) / in_a_row)
    size = (width, sum(heights) + legend)
    engine = ConstrainedLayoutEngine(w_pad=LABEL)
    ratios: dict[str, Any] = {"height_ratios": heights, "width_ratios": widths}
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout=engine, **ratios)
    for place, panel in zip(axes.flat, panels, strict=False):
        panel.draw(place, figure)
    for place in list(axes.flat)[len(panels) :]:
        place.set_axis_off()
    if methods:
        figure.legend(
            [_handle(known[method], method) for method in methods],
            [method.label for method in methods],
            loc="outside lower center",
            ncols=min(in_a_row, len(methods)),
        )
    return figure


def _handle(look: Style, method: Method) -> Any:
    from matplotlib.lines import Line2D

    if method == DENSE:
        return Line2D([], [], color=look.light, linestyle="--", linewidth=1)
    return Line2D([], [], color=look.light, marker=look.marker, markersize=5, linewidth=1.2)


def _save(folder: Path, name: str, panels: Sequence[Panel], known: Looks) -> list[Path]:
    from matplotlib import pyplot

    figure = figure_of(panels, known)
    paths = [folder / f"{name}.png", folder / f"{name}.pdf"]
    figure.savefig(paths[0], dpi=144)
    figure.savefig(paths[1], metadata={"CreationDate": None})  # equal runs, equal bytes
    pyplot.close(figure)
    return paths
