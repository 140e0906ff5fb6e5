"""Figures as PNG and PDF, for papers and READMEs: the page's charts without its choices.

One legend a figure stands below its panels (`panels.py`), never on a point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from besa_exp.report.methods import Method, Style
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
from besa_exp.report.read import Report
from besa_exp.report.summaries import DENSE

COLUMNS = 3
LABEL = 0.16  # inches: half of a last tick's label
LETTERS = 12  # of a legend's, an inch
TITLES, TITLE_LETTERS = "left", 12  # where they stand, and how many letters an inch
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
    "axes.titlelocation": TITLES,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "pdf.fonttype": 42,
}


def draw(report: Report, folder: Path) -> list[Path]:
    """Every figure there is data for, written into `folder`; the files. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    with mpl.rc_context(LOOK):  # pyright: ignore[reportArgumentType] - its keys are a union of literals
        drawn = ((name, panels) for name, panels in panels_of(report).items() if panels)
        return [path for name, panels in drawn for path in _save(folder / name, panels, report.looks)]


def panels_of(report: Report) -> dict[str, list[Panel]]:
    """The panels of each figure, by its file's name."""
    compared, known = [cell for cell in report.cells if not cell.apart], report.looks
    return {
        "perplexity": score_panels(compared, "perplexity", known),
        "zero_shot": score_panels(compared, "zero_shot", known),
        "delta_to_dense": delta_panels(report.comparisons, known),
        "time_against_score": pareto_panels(report.comparisons, known),
        "reconstruction": error_panels(report.errors, known),
        "allocation": allocation_panels(report.runs),
        "loss_curves": curve_panels(report.runs, report.curves),
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
    figure.draw_without_rendering()  # from here on the panels' widths are known
    for place in figure.axes:
        letters = int(TITLE_LETTERS * place.get_window_extent().width / figure.dpi)
        place.set_title(fill(place.get_title(loc=TITLES), max(1, letters)), loc=TITLES)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it is laid out: once for all files
    return figure


def _handle(look: Style, method: Method) -> Any:
    from matplotlib.lines import Line2D

    if method == DENSE:
        return Line2D([], [], color=look.light, linestyle="--", linewidth=1)
    return Line2D([], [], color=look.light, marker=look.marker, markersize=5, linewidth=1.2)


def _save(stem: Path, panels: Sequence[Panel], known: Looks) -> list[Path]:
    from matplotlib import pyplot

    figure = figure_of(panels, known)
    paths = [stem.with_suffix(".png"), stem.with_suffix(".pdf")]
    figure.savefig(paths[0], dpi=144)
    figure.savefig(paths[1], metadata={"CreationDate": None})  # equal runs, equal bytes
    pyplot.close(figure)
    return paths
