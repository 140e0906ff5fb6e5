"""A comparison as a terminal table, as LaTeX for a paper (booktabs), and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from besa_exp.display.terminal import colour_of_loss
from besa_exp.report.comparison import COSTS, Comparison, Row, lost
from besa_exp.report.runs import Measure
from besa_exp.report.summaries import Cell

MISSED = "!"  # behind a measured sparsity that is half a point or more off its target
LONGEST_NAME = 60  # columns; a longer name goes on in the next line
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {mark: f"\\{mark}" for mark in "&%$#_{}"}


def terminal_table(comparison: Comparison, width: int) -> RenderableType:
    """Rich: as many measures as `width` columns hold, the first one always, what was lost beside each of them. Where
    that leaves too little for the methods' names, what runs cost goes too."""
    costs = _shown_costs(comparison)
    for number in range(len(comparison.measures), 0, -1):
        for timed in (True, False):
            table = _table(comparison, comparison.measures[:number], timed, costs)
            if Measurement.get(Console(width=1000), Console(width=1000).options, table).maximum <= width:
                return Group(*_headed(comparison, table, len(comparison.measures) - number))
    table = _table(comparison, comparison.measures[:1], False, {})
    return Group(*_headed(comparison, table, len(comparison.measures) - 1))


def _headed(comparison: Comparison, table: Table, hidden: int) -> list[RenderableType]:
    cells = [
        f"{measure.label} {shown(cell)}" for measure, cell in comparison.dense.items() if measure in comparison.measures
    ]
    head = Text(comparison.model, style="bold")
    head.append(f" · dense: {', '.join(cells[:4])}" if cells else " · the dense model was not scored", style="not bold")
    lines: list[RenderableType] = [head, table]
    if any(row.missed for row in comparison.rows):
        lines.append(Text(f"{MISSED} missed its target by half a point or more", style="yellow"))
    reasons = _reasons(comparison)
    lines += [Text(f"[{number}] not comparable with the rows above: {reason}") for reason, number in reasons.items()]
    if hidden:
        lines.append(Text(f"{hidden} more score{'s' if hidden > 1 else ''} than the screen holds: --csv has them all"))
    return lines


def _reasons(comparison: Comparison) -> dict[str, int]:
    apart = dict.fromkeys(row.apart for row in comparison.rows if row.apart)
    return {reason: number for number, reason in enumerate(apart, 1)}


def _table(comparison: Comparison, measures: Sequence[Measure], timed: bool, costs: Mapping[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("method", overflow="fold", max_width=LONGEST_NAME)
    for head in ("target", "zeros"):
        table.add_column(head, justify="right", no_wrap=True)
    for head in costs.values():
        table.add_column(head, justify="right", no_wrap=True)
    for measure in measures:
        head = Text(f"{measure.label} {'↓' if measure.lower else '↑'}")  # text: a name may hold brackets
        table.add_column(head, justify="right", no_wrap=True)
        if measure in comparison.dense:
            table.add_column("vs dense", justify="right", no_wrap=True)
    if timed:
        table.add_column("pruning", justify="right", no_wrap=True)
    before: float | None = None
    reasons = _reasons(comparison)
    for row in comparison.rows:
        if before is not None and (row.target != before or row.apart):
            table.add_section()
        before = row.target
        table.add_row(*_terminal_cells(comparison, row, measures, timed, costs, reasons))
    return table


def _shown_costs(comparison: Comparison) -> dict[str, str]:
    """The heads of what rows cost, by key, where they differ: parts of a model are gone whole, or it was timed."""
    heads = {COSTS[0]: "parameters", COSTS[-1]: "tokens/s"}
    narrowed = any(row.cost.get(COSTS[0], 1.0) < 1 for row in comparison.rows)
    timed = any(COSTS[-1] in row.cost for row in comparison.rows)
    return {key: heads[key] for key, shows in ((COSTS[0], narrowed), (COSTS[-1], timed)) if shows}


def _terminal_cells(
    comparison: Comparison,
    row: Row,
    measures: Sequence[Measure],
    timed: bool,
    costs: Iterable[str],
    reasons: Mapping[str, int],
) -> list[Text]:
    name = Text(row.method.label + (f" [{reasons[row.apart]}]" if row.apart else ""), style="dim" if row.apart else "")
    zeros = Text(f"{row.measured:.2%}".replace("%", " %") + (f" {MISSED}" if row.missed else ""))
    zeros.stylize("yellow" if row.missed else "")
    found = [name, Text(_percent(row.target)), zeros]
    for key in costs:
        value = row.cost.get(key)
        found.append(Text("" if value is None else f"{value:.1%}" if key == COSTS[0] else f"{value:,.0f}"))
    for measure in measures:
        cell = row.scores.get(measure)
        best = comparison.place(row, measure) == 0
        found.append(Text(shown(cell) if cell else "n/a", style="bold" if best else ""))
        if measure in comparison.dense:
            found.append(_difference(measure, cell, comparison.dense[measure].mean))
    return [*found, *([Text(_time(row.seconds))] if timed else [])]


def _difference(measure: Measure, cell: Cell | None, dense: float) -> Text:
    if cell is None or cell.apart:  # measured otherwise, as on other tokens than the dense model's score
        return Text("")
    loss = lost(measure, cell.mean, dense)
    if measure.kind == "zero_shot":
        return Text(f"{100 * (cell.mean - dense):+.1f} pt", style=colour_of_loss(loss, accuracy=True))
    return Text(told_share(loss), style=colour_of_loss(loss))


def told_share(loss: float) -> str:
    """`+24 %`, `+0.4 %`, `x 123` where it is more than tenfold."""
    return f"x {1 + loss:,.0f}" if loss > 9 else f"{100 * loss:+.{0 if abs(loss) >= 0.1 else 1}f} %"


def shown(cell: Cell) -> str:
    """Mean, spread and number of runs, with as many digits as say something."""
    spread = (
        f" ± {_number(cell.measure, cell.spread, cell.mean)} ({len(cell.values)})" if cell.spread is not None else ""
    )
    return _number(cell.measure, cell.mean, cell.mean) + spread


def _number(measure: Measure, value: float, beside: float) -> str:
    if measure.kind == "zero_shot":
        return f"{value:.4f}"
    if measure.kind == "reconstruction":
        return f"{value:.3g}"
    digits = 3 if beside < 100 else 1 if beside < 1000 else 0
    return f"{value:,.{digits}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def latex(comparisons: Sequence[Comparison]) -> str:
    """A booktabs table a model: the best score at each target bold, the second underlined, spread where there is one.

    What may not be compared is left out, and said so in a comment."""
    lines = ["% needs \\usepackage{booktabs}; best bold, second underlined; mean \\pm sample standard deviation (runs)"]
    for comparison in comparisons:
        apart = sum(bool(row.apart) for row in comparison.rows)
        lines += ["", *([f"% {apart} rows are not comparable with these and are left out"] if apart else [])]
        lines += [*_tabular(comparison)]
    return "\n".join(lines) + "\n"


def _tabular(comparison: Comparison) -> list[str]:
    measures, rows = comparison.measures, [row for row in comparison.rows if not row.apart]
    arrows = ["$\\downarrow$" if m.lower else "$\\uparrow$" for m in measures]
    heads = [f"{_escaped(m.label)} {arrow}" for m, arrow in zip(measures, arrows, strict=True)]
    lines = [f"% {comparison.model}".replace("\n", " "), f"\\begin{{tabular}}{{lrr{'r' * len(measures)}}}", "\\toprule"]
    lines += [" & ".join(["Method", "Target", "Zeros", *heads]) + r" \\", "\\midrule"]
    if comparison.dense:
        cells = [_tex(comparison.dense[m]) if m in comparison.dense else "--" for m in measures]
        lines += [" & ".join(["Dense", "", "", *cells]) + r" \\", "\\midrule"]
    for at, row in enumerate(rows):
        if at and row.target != rows[at - 1].target:
            lines.append("\\midrule")
        cells = [_ranked(comparison, row, measure) for measure in measures]
        percent = [f"{100 * row.target:.4g}\\,\\%", f"{100 * row.measured:.2f}\\,\\%"]
        lines.append(" & ".join([_escaped(row.method.label), *percent, *cells]) + r" \\")
    return [*lines, "\\bottomrule", "\\end{tabular}"]


def _ranked(comparison: Comparison, row: Row, measure: Measure) -> str:
    if measure not in row.scores:
        return "--"
    text, place = _tex(row.scores[measure]), comparison.place(row, measure)
    return f"\\textbf{{{text}}}" if place == 0 else f"\\underline{{{text}}}" if place == 1 else text


def _tex(cell: Cell) -> str:
    return shown(cell).replace(" ± ", " $\\pm$ ")


def _escaped(text: str) -> str:
    return "".join(SPECIAL.get(mark, mark) for mark in text)


def csv_of(comparisons: Sequence[Comparison]) -> str:
    """A row for each model, method and target; for each measure mean, deviation, runs and what was lost."""
    measures = tuple(dict.fromkeys(measure for comparison in comparisons for measure in comparison.measures))
    heads = ["model", "method", "target_sparsity", "measured_sparsity", "target_missed", "runs"]
    for measure in measures:
        heads += [f"{measure.kind} {measure.label}{what}" for what in ("", " deviation", " lost against dense")]
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow([*heads, *COSTS, "prune_seconds", "not_comparable"])
    for comparison in comparisons:
        dense, blank = comparison.dense, [""] * (len(COSTS) + 2)
        if dense:
            rows.writerow([comparison.model, "dense", 0.0, 0.0, False, "", *_csv_cells(dense, dense, measures), *blank])
        for row in comparison.rows:
            facts = [comparison.model, row.method.label, row.target, row.measured, row.missed, row.runs]
            costs = [row.cost.get(key, "") for key in COSTS]
            rows.writerow([*facts, *_csv_cells(row.scores, dense, measures), *costs, row.seconds, row.apart])
    return file.getvalue()


def _csv_cells(
    scores: Mapping[Measure, Cell], dense: Mapping[Measure, Cell], measures: Sequence[Measure]
) -> Iterator[object]:
    for measure in measures:
        cell, beside = scores.get(measure), dense.get(measure)
        if cell:
            loss = lost(measure, cell.mean, beside.mean) if beside and not cell.apart else ""
            yield from (cell.mean, cell.spread, loss)
        else:
            yield from [""] * 3
