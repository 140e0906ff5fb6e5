"""Figures as PNG and PDF, for papers and READMEs: the page's charts without its choices.

Where a chart needs one target, it is the one nearest to 50 % among those with the most methods; the title says it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from besa_exp.report.curves import Curve
from besa_exp.report.depth import Allocation, ErrorAlongDepth, allocation
from besa_exp.report.methods import Method, Style, styles
from besa_exp.report.runs import RunRecord
from besa_exp.report.summaries import Cell

PANEL = (4.6, 3.4)  # inches
COLUMNS = 3
LOOK = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "axes.edgecolor": "#6b7280",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fontsize": 8,
    "pdf.fonttype": 42,
}
LINES = ("-", "--", ":", "-.")  # of a pruner's variants


def draw(
    folder: Path,
    runs: Sequence[RunRecord],
    curves: Sequence[Curve],
    found: Sequence[Cell],
    errors: Sequence[ErrorAlongDepth],
) -> list[Path]:
    """Every figure there is data for, written into `folder`; the files. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    with mpl.rc_context(LOOK):  # pyright: ignore[reportArgumentType] - its keys are a union of literals
        compared = [cell for cell in found if not cell.apart]
        panels = {
            "perplexity": _score_panels(compared, "perplexity"),
            "zero_shot": _score_panels(compared, "zero_shot"),
            "reconstruction": _error_panels(errors),
            "allocation": _allocation_panels(runs),
            "loss_curves": _curve_panels(runs, curves),
        }
        return [path for name, drawn in panels.items() if drawn for path in _save(folder, name, drawn)]


Panel = Callable[[Any, Any], None]  # draws on one pair of axes, of a figure


def _save(folder: Path, name: str, panels: Sequence[Panel]) -> list[Path]:
    from matplotlib import pyplot

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width, height = PANEL[0] * columns, PANEL[1] * rows
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False)
    # fixed margins in inches: measuring all labels (tight_layout) takes longer than drawing
    figure.subplots_adjust(0.65 / width, 0.75 / height, 1 - 0.15 / width, 1 - 0.35 / height, 0.24, 0.42)
    for place, panel in zip(axes.flat, panels, strict=False):
        panel(place, figure)
    for place in list(axes.flat)[len(panels) :]:
        place.set_axis_off()
    paths = [folder / f"{name}.png", folder / f"{name}.pdf"]
    figure.savefig(paths[0], dpi=144)
    figure.savefig(paths[1], metadata={"CreationDate": None})  # equal runs, equal bytes
    pyplot.close(figure)
    return paths


def _logarithmic(axes: Any) -> None:
    """A logarithmic y axis whose ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _looks(methods: Sequence[Method]) -> dict[Method, tuple[Style, str]]:
    """Colour and marker by pruner, line by its variants."""
    chosen = styles([method.pruner for method in methods])
    variants: dict[str, list[Method]] = {}
    for method in dict.fromkeys(methods):
        variants.setdefault(method.pruner, []).append(method)
    return {m: (chosen[m.pruner], LINES[variants[m.pruner].index(m) % len(LINES)]) for m in dict.fromkeys(methods)}


def _score_panels(found: Sequence[Cell], kind: str) -> list[Panel]:
    chosen = [cell for cell in found if cell.measure.kind == kind]
    looks = _looks([cell.method for cell in chosen])

    def panel(own: Sequence[Cell]) -> Panel:
        def on(axes: Any, _: Any) -> None:
            for method in dict.fromkeys(cell.method for cell in own):
                line = [cell for cell in own if cell.method == method]
                look, dashes = looks[method]
                if method.pruner == "dense":
                    axes.axhline(line[0].mean, color=look.light, linewidth=1, linestyle="--", label=method.label)
                    continue
                x, y, error = zip(*((cell.measured, cell.mean, cell.spread or 0.0) for cell in line), strict=True)
                style = {"color": look.light, "marker": look.marker, "linestyle": dashes}
                axes.errorbar(x, y, error, label=method.label, markersize=4.5, linewidth=1.4, capsize=2, **style)
            axes.set(title=f"{own[0].model}: {own[0].measure.label}", xlabel="measured sparsity")
            axes.set_ylabel("perplexity" if kind == "perplexity" else "accuracy")
            axes.set_xticks(sorted({cell.target for cell in own if cell.target} or {0.0}))
            if kind == "perplexity":
                _logarithmic(axes)
            axes.legend(loc="upper left" if kind == "perplexity" else "lower left")

        return on

    groups = dict.fromkeys((cell.model, cell.measure) for cell in chosen)
    return [panel([cell for cell in chosen if (cell.model, cell.measure) == group]) for group in groups]


def _error_panels(errors: Sequence[ErrorAlongDepth]) -> list[Panel]:
    looks = _looks([error.method for error in errors])

    def panel(own: Sequence[ErrorAlongDepth]) -> Panel:
        def on(axes: Any, _: Any) -> None:
            for error in own:
                look, dashes = looks[error.method]
                style = {"color": look.light, "marker": look.marker, "linestyle": dashes}
                axes.errorbar(
                    error.blocks,
                    error.means,
                    error.spreads,
                    label=error.method.label,
                    markersize=4,
                    linewidth=1.4,
                    **style,
                )
            axes.set(title=f"{own[0].model}, target {own[0].target:.0%}", xlabel="block", ylabel="reconstruction loss")
            axes.xaxis.get_major_locator().set_params(integer=True)
            _logarithmic(axes)
            axes.legend(loc="best")

        return on

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


def _allocation_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    def panel(run: RunRecord, given: Allocation) -> Panel:
        def on(axes: Any, figure: Any) -> None:
            centre, reach = run.measured or 0.0, max(0.02, *(abs(v - (run.measured or 0.0)) for v in _known(given)))
            picture = axes.imshow(
                given.sparsities, cmap="PuOr_r", vmin=centre - reach, vmax=centre + reach, aspect="auto"
            )
            axes.set_xticks(range(len(given.linears)), given.linears, rotation=45, ha="right")
            axes.set(title=f"{run.model}, {run.method.label}, {run.target or 0:.0%}, seed {run.seed}", ylabel="block")
            axes.grid(False)
            figure.colorbar(picture, ax=axes, label="sparsity")

        return on

    def is_uneven(number: int) -> bool:
        values = _known(allocation(runs[number]))
        return max(values) - min(values) > 0.02  # less is rounding

    return [panel(runs[number], allocation(runs[number])) for number in _shown_runs(runs, is_uneven)]


def _known(given: Allocation) -> list[float]:
    return [pair[1] / pair[0] for row in given.counts for pair in row if pair]


def _curve_panels(runs: Sequence[RunRecord], curves: Sequence[Curve]) -> list[Panel]:
    def panel(run: RunRecord, curve: Curve) -> Panel:
        def on(axes: Any, _: Any) -> None:
            import matplotlib as mpl

            blocks = list(dict.fromkeys(point[0] for point in curve.points))
            for place, block in enumerate(blocks):
                points = [(point[1], point[3]) for point in curve.points if point[0] == block]
                colour = mpl.colormaps["cividis"](0.9 * place / max(1, len(blocks) - 1))
                label = f"block {block}" if place in (0, len(blocks) - 1) else None
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=label)
            axes.set(title=f"{run.model}, {run.method.label}, {run.target or 0:.0%}, seed {run.seed}", xlabel="step")
            axes.set(ylabel="reconstruction loss")
            _logarithmic(axes)
            axes.legend(loc="upper right")

        return on

    return [panel(runs[n], curves[n]) for n in _shown_runs(runs, lambda number: bool(curves[number].points))]
