"""The charts of the figures, one panel each. Where a chart needs one target, it is the one nearest to 50 % among those
with the most methods; the title says it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from besa_exp.report.comparison import Comparison, lost
from besa_exp.report.curves import Curve
from besa_exp.report.depth import Allocation, ErrorAlongDepth, allocation
from besa_exp.report.methods import Method, Style
from besa_exp.report.runs import Measure, RunRecord
from besa_exp.report.summaries import DENSE, Cell

PANEL = (4.4, 3.2)  # inches
ROW = 0.26  # inches a method takes in a dot chart
Looks = Mapping[Method, Style]


@dataclass(frozen=True)
class Panel:
    """`draw` draws on one pair of axes of a figure; `height` in inches; `methods` stand in the figure's legend, `names`
    beside the axes, which the panel is made wider for where they are long."""

    draw: Callable[[Any, Any], None]
    height: float = PANEL[1]
    methods: tuple[Method, ...] = field(default=())
    names: tuple[str, ...] = ()

    @property
    def width(self) -> float:
        return PANEL[0] + max(0.0, 0.075 * (max(map(len, self.names), default=0) - 16))


def _logarithmic(axis: Any) -> None:
    """A logarithmic axis whose ticks are plain numbers, where there is a number above 0."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if not axis.get_data_interval()[1] > 0:
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _wide(values: Sequence[float]) -> bool:
    """Whether a linear axis would squeeze most of them."""
    positive = [value for value in values if value > 0]
    return len(positive) == len(values) and bool(values) and max(positive) > 3 * min(positive)


def _name(kind: str) -> str:
    return "perplexity" if kind == "perplexity" else "accuracy"


def score_panels(found: Sequence[Cell], kind: str, known: Looks) -> list[Panel]:
    """Against sparsity where there are several targets, else a dot chart; none of a dense model alone."""
    chosen = [cell for cell in found if cell.measure.kind == kind]
    groups = dict.fromkeys((cell.model, cell.measure) for cell in chosen if cell.method != DENSE)
    panels = []
    for group in groups:
        own = [cell for cell in chosen if (cell.model, cell.measure) == group]
        several = len({cell.target for cell in own if cell.method != DENSE}) > 1
        panels.append((_line_panel if several else _dot_panel)(own, known))
    return panels


def _line_panel(own: Sequence[Cell], known: Looks) -> Panel:
    methods = tuple(dict.fromkeys(cell.method for cell in own))

    def on(axes: Any, _: Any) -> None:
        from matplotlib.ticker import PercentFormatter

        for method in methods:
            line, look = [cell for cell in own if cell.method == method], known[method]
            if method == DENSE:
                axes.axhline(line[0].mean, color=look.light, linewidth=1, linestyle="--")
                continue
            x, y, error = zip(*((cell.measured, cell.mean, cell.spread or 0.0) for cell in line), strict=True)
            style = {"color": look.light, "marker": look.marker, "linestyle": "-"}
            axes.errorbar(x, y, error, markersize=4.5, linewidth=1.4, capsize=2, **style)
        axes.set(title=f"{own[0].model}: {own[0].measure.label}", xlabel="measured sparsity")
        axes.set_ylabel(_name(own[0].measure.kind))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if own[0].measure.kind == "perplexity" and _wide([cell.mean for cell in own]):
            _logarithmic(axes.yaxis)

    return Panel(on, methods=methods)


def _dot_panel(own: Sequence[Cell], known: Looks) -> Panel:
    """Methods down, the best on top; each run a faint dot, the mean with its deviation; dense a line."""
    measure = own[0].measure
    sign = 1 if measure.lower else -1
    cells = sorted((cell for cell in own if cell.method != DENSE), key=lambda cell: sign * cell.mean)
    dense = next((cell for cell in own if cell.method == DENSE), None)

    def on(axes: Any, _: Any) -> None:
        for place, cell in enumerate(cells):
            look = known[cell.method]
            axes.plot(cell.values, [place] * len(cell.values), ".", color=look.light, alpha=0.45, markersize=4)
            axes.errorbar(
                cell.mean, place, xerr=cell.spread or 0.0, color=look.light, marker=look.marker, markersize=6, capsize=2
            )
        if dense:
            axes.axvline(dense.mean, color=known[DENSE].light, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(cells)), [cell.method.label for cell in cells])
        axes.set_ylim(len(cells) - 0.5, -0.5)
        axes.set(title=f"{own[0].model}: {measure.label} at {cells[0].target:.4g}", xlabel=_name(measure.kind))
        axes.grid(visible=False, axis="x")
        if measure.kind == "perplexity" and _wide([*(cell.mean for cell in cells), *([dense.mean] if dense else [])]):
            _logarithmic(axes.xaxis)

    names = tuple(cell.method.label for cell in cells)
    return Panel(on, max(1.6, 0.9 + ROW * len(cells)), (DENSE,) if dense else (), names)


def _ranked(comparison: Comparison) -> Iterator[tuple[Measure, float, list[tuple[Method, float, float, float | None]]]]:
    """(measure, target, [(method, what was lost against dense, score, seconds)]) where dense was scored."""
    rows = [row for row in comparison.rows if not row.apart]
    if not rows:
        return
    target = usual_target([(row.target, row.method) for row in rows])
    for measure in comparison.measures:
        if (dense := comparison.dense.get(measure)) is None:
            continue
        scored = [(row, row.scores[measure]) for row in rows if row.target == target and measure in row.scores]
        found = [(r.method, lost(measure, cell.mean, dense.mean), cell.mean, r.seconds) for r, cell in scored]
        if found:
            yield measure, target, sorted(found, key=lambda one: one[1])


def delta_panels(comparisons: Sequence[Comparison], known: Looks) -> list[Panel]:
    """What each method lost against the dense model, as bars."""

    def panel(model: str, measure: Measure, target: float, found: Sequence[tuple]) -> Panel:
        def on(axes: Any, _: Any) -> None:
            from matplotlib.ticker import PercentFormatter

            places = range(len(found))
            axes.barh(places, [one[1] for one in found], color=[known[one[0]].light for one in found], height=0.6)
            axes.set_yticks(places, [one[0].label for one in found])
            axes.set_ylim(len(found) - 0.5, -0.5)
            axes.axvline(0, color="#6b7280", linewidth=0.8)
            label = "accuracy lost" if measure.kind == "zero_shot" else "perplexity above dense"
            axes.set(title=f"{model}: {measure.label} at {target:.4g}", xlabel=label)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.grid(visible=False, axis="y")
            if measure.kind == "perplexity" and _wide([one[1] for one in found]) and found[-1][1] > 3:
                axes.set_xscale("symlog", linthresh=0.1)
                axes.set_xticks([10.0**power for power in range(-1, 7) if 10.0**power <= 2 * found[-1][1]][-5:])

        return Panel(on, max(1.6, 0.9 + ROW * len(found)), names=tuple(one[0].label for one in found))

    return [
        panel(comparison.model, measure, target, found)
        for comparison in comparisons
        for measure, target, found in _ranked(comparison)
    ]


def pareto_panels(comparisons: Sequence[Comparison], known: Looks) -> list[Panel]:
    """Pruning time against the first score; a line joins the methods that none is both faster and better than."""

    def panel(model: str, measure: Measure, target: float, found: Sequence[tuple]) -> Panel:
        sign = 1 if measure.lower else -1

        def on(axes: Any, _: Any) -> None:
            for method, _lost, score, seconds in found:
                look = known[method]
                axes.plot(seconds, score, marker=look.marker, color=look.light, markersize=6, linestyle="none")
            front = pareto([(one[3], sign * one[2]) for one in found])
            axes.plot([x for x, _ in front], [sign * y for _, y in front], color="#9ca3af", linewidth=1, zorder=0)
            axes.set(title=f"{model}: {measure.label} at {target:.4g}", xlabel="seconds to prune")
            axes.set_ylabel(_name(measure.kind))
            axes.margins(0.08)
            if _wide([one[3] for one in found]):
                _logarithmic(axes.xaxis)
            if measure.kind == "perplexity" and _wide([one[2] for one in found]):
                _logarithmic(axes.yaxis)

        return Panel(on, methods=tuple(one[0] for one in found))

    panels = []
    for comparison in comparisons:
        for measure, target, found in list(_ranked(comparison))[:1]:
            timed = [one for one in found if one[3]]
            panels += [panel(comparison.model, measure, target, timed)] if len(timed) > 1 else []
    return panels


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is as good as in both and better in one; less is better; from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def error_panels(errors: Sequence[ErrorAlongDepth], known: Looks) -> list[Panel]:
    """The reconstruction loss along depth, a panel a model."""

    def panel(own: Sequence[ErrorAlongDepth]) -> Panel:
        def on(axes: Any, _: Any) -> None:
            for error in own:
                look = known[error.method]
                style = {"color": look.light, "marker": look.marker, "markersize": 4, "linewidth": 1.4}
                axes.errorbar(error.blocks, error.means, error.spreads, **style)
            axes.set(title=f"{own[0].model}, target {own[0].target:.0%}", xlabel="block", ylabel="reconstruction loss")
            axes.xaxis.get_major_locator().set_params(integer=True)
            _logarithmic(axes.yaxis)

        return Panel(on, methods=tuple(error.method for error in own))

    panels = []
    for model in dict.fromkeys(error.model for error in errors):
        own = [error for error in errors if error.model == model]
        target = usual_target([(error.target, error.method) for error in own])
        panels.append(panel([error for error in own if error.target == target]))
    return panels


def usual_target(pairs: Sequence[tuple[float, Method]]) -> float:
    """The target nearest to 50 % among those with the most methods."""
    methods = {target: len({method for other, method in pairs if other == target}) for target, _ in pairs}
    return min(methods, key=lambda target: (-methods[target], abs(target - 0.5)))


def _shown_runs(runs: Sequence[RunRecord], useful: Callable[[int], bool]) -> list[int]:
    """The lowest seed of each model and method at the model's target."""
    usable = [number for number, run in enumerate(runs) if run.blocks and run.target and useful(number)]
    shown = []
    for model in dict.fromkeys(runs[number].model for number in usable):
        own = [number for number in usable if runs[number].model == model]
        target = usual_target([(runs[number].target or 0.0, runs[number].method) for number in own])
        own = sorted(
            (n for n in own if runs[n].target == target), key=lambda n: (runs[n].method.order, runs[n].seed or 0)
        )
        first: dict[Method, int] = {}
        for number in own:
            first.setdefault(runs[number].method, number)
        shown += first.values()
    return shown


def allocation_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Heat maps with one range of colours for all runs of a model."""

    def panel(run: RunRecord, given: Allocation, reach: float) -> Panel:
        def on(axes: Any, figure: Any) -> None:
            centre = run.target or 0.0
            picture = axes.imshow(
                given.sparsities, cmap="PuOr_r", vmin=centre - reach, vmax=centre + reach, aspect="auto"
            )
            axes.set_xticks(range(len(given.linears)), given.linears, rotation=45, ha="right")
            axes.set(title=f"{run.model}, {run.method.label}, {run.target or 0:.0%}, seed {run.seed}", ylabel="block")
            axes.grid(visible=False)
            figure.colorbar(picture, ax=axes, label="sparsity")

        return Panel(on)

    def is_uneven(number: int) -> bool:
        values = _known(allocation(runs[number]))
        return max(values) - min(values) > 0.02  # less is rounding

    given = [(runs[number], allocation(runs[number])) for number in _shown_runs(runs, is_uneven)]
    reach: dict[str, float] = {}
    for run, own in given:
        farthest = max(abs(value - (run.target or 0.0)) for value in _known(own))
        reach[run.model] = max(0.02, reach.get(run.model, 0.0), farthest)
    return [panel(run, own, reach[run.model]) for run, own in given]


def _known(given: Allocation) -> list[float]:
    return [pair[1] / pair[0] for row in given.counts for pair in row if pair]


def curve_panels(runs: Sequence[RunRecord], curves: Sequence[Curve]) -> list[Panel]:
    """The loss along the steps of every block, a panel a run."""

    def panel(run: RunRecord, curve: Curve) -> Panel:
        def on(axes: Any, figure: Any) -> None:
            from matplotlib import colormaps
            from matplotlib.cm import ScalarMappable
            from matplotlib.colors import Normalize

            blocks = list(dict.fromkeys(point[0] for point in curve.points))
            for place, block in enumerate(blocks):
                points = [(point[1], point[3]) for point in curve.points if point[0] == block]
                colour = colormaps["cividis"](0.9 * place / max(1, len(blocks) - 1))
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1)
            axes.set(title=f"{run.model}, {run.method.label}, {run.target or 0:.0%}, seed {run.seed}", xlabel="step")
            axes.set(ylabel="reconstruction loss")
            _logarithmic(axes.yaxis)
            norm = Normalize(blocks[0], max(blocks[-1], blocks[0] + 1) / 0.9)
            scale = figure.colorbar(ScalarMappable(norm, "cividis"), ax=axes, label="block")
            scale.set_ticks(sorted({blocks[0], blocks[len(blocks) // 2], blocks[-1]}))
            scale.ax.set_ylim(blocks[0], max(blocks[-1], blocks[0] + 1))

        return Panel(on)

    return [panel(runs[n], curves[n]) for n in _shown_runs(runs, lambda number: bool(curves[number].points))]
