"""The study's figures, from the records that collect.py keeps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from tables import LAYER_WISE, LINEARS, METHODS, MODELS, PAPER, chosen, short

from besa_exp.report.methods import styles


def draw(rows: Sequence[dict], folder: Path) -> None:
    """error.png and allocation.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 8}):
        _errors(rows, folder / "error.png")
        _allocation(rows, folder / "allocation.png")


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _errors(rows: Sequence[dict], path: Path) -> None:
    """Against the dense model, by block; mean and spread over seeds."""
    from matplotlib import pyplot

    looks = styles([method.split(",")[0] for method in METHODS])
    figure, axes = pyplot.subplots(1, len(MODELS), figsize=(14, 3.8))
    for axis, model in zip(axes, MODELS, strict=True):
        for method in METHODS[1:]:
            blocks = list(zip(*(row["error"] for row in chosen(rows, model, method) if "error" in row), strict=True))
            means = [statistics.mean(block) for block in blocks]
            around = [statistics.stdev(block) if len(block) > 1 else 0.0 for block in blocks]
            look = looks[method.split(",")[0]]
            dashes = "--" if method == LAYER_WISE else "-"
            axis.errorbar(
                range(len(means)), means, around, label=short(method), color=look.light, marker=look.marker,
                linestyle=dashes, linewidth=1.4, markersize=4.5, capsize=2,
            )  # fmt: skip
        axis.set(title=model, xlabel="after block", ylabel="error against the dense model", yscale="log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}" if model == "stories260K" else "")
    axes[0].legend(loc="best")
    _save(figure, path)


def _allocation(rows: Sequence[dict], path: Path) -> None:
    """Mean over seeds of the sparsity by block and linear, besa and besa_paper."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(MODELS), 2, figsize=(7, 2.6 * len(MODELS)))
    for axis, (model, method) in zip(axes.flat, [(m, p) for m in MODELS for p in (PAPER, "besa")], strict=True):
        own = chosen(rows, model, method)
        blocks = range(len(own[0]["sparsity"]))
        grid = [[statistics.mean(row["sparsity"][b][linear] for row in own) for linear in LINEARS] for b in blocks]
        reach = max(abs(value - 0.5) for line in grid for value in line)
        picture = axis.imshow(grid, cmap="PuOr_r", vmin=0.5 - reach, vmax=0.5 + reach, aspect="auto")
        axis.set_xticks(range(len(LINEARS)), LINEARS, rotation=45)
        axis.set(title=f"{model}, {method}", ylabel="block")
        figure.colorbar(picture, ax=axis)
    _save(figure, path)
