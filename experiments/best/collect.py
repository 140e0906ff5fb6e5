"""Collects run folders of the studies `best` and `budgets` into results.json, tables.md and perplexity.png beside this
file.

What results.json holds already stays, unless the same run was made again.

    python experiments/best/collect.py [outputs/best outputs/budgets]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from besa_exp.display.markdown import markdown_table
from besa_exp.report.methods import styles
from besa_exp.report.runs import RunRecord, read_run
from besa_exp.report.studies import kept_records, over_seeds

HERE = Path(__file__).parent
MODELS = ("babyllama-105", "stories260K", "embedded")
COLUMNS = [("50 %", "unstructured", 0.5), ("60 %", "unstructured", 0.6), ("70 %", "unstructured", 0.7)]
COLUMNS += [("80 %", "unstructured", 0.8), ("2:4", "2:4", 0.5)]
TARGETS = [0.5, 0.6, 0.7, 0.8]
METHODS = ("wanda", "wanda+dsnot", "wanda+obs", "wanda+admm", "ria", "ria, permute=true", "sparsegpt", "besa")
METHODS += ("sparsegpt+reconstruct", "besa+reconstruct", "best")
PIECES = {
    "best": "all of it",
    "best, begin=sparsegpt": "SparseGPT's mask and weights at the start",
    "best, start=0.7": "the last 30 % closed bit by bit while weights are tuned",
    "best, start=0": "no start from SparseGPT",
    "best, until=0": "the mask fixed at once, not closed bit by bit",
    "best, dense_targets=false": "targets from the pruned prefix",
    "best, tuning.checks=1": "the probe does not choose",
    "sparsegpt+reconstruct": "SparseGPT's mask, its kept weights tuned",
}
TURNED = "dlp turned round"  # as it was until blocks of a large median gave up more
BUDGETS = ("uniform", "owl", "dlp", "dlp, width=0.15", "dlp, width=0.08", TURNED, f"{TURNED}, width=0.15")
BUDGETS += (f"{TURNED}, width=0.08", "alpha", "atp", "learned", "evopress")
UNDER = ("wanda", "sparsegpt", "best")
NONE = "n/a"


def record(run: RunRecord) -> dict[str, Any]:
    """What the study keeps of a run."""
    (perplexity,) = [score.value for score in run.scores if score.measure.kind == "perplexity"]
    accuracies = [score.value for score in run.scores if score.measure.metric == "acc_norm"]
    return {
        "model": run.model,
        "method": run.method.label.replace(f", {run.pattern}", ""),
        "pattern": run.pattern,
        "target": run.target,
        "seed": run.seed,
        "measured": run.measured,
        "perplexity": perplexity,
        "accuracy": accuracies[0] if accuracies else None,
        "prune_processor_seconds": run.seconds.get("prune_processor"),
        "peak_host_bytes": run.memory.get("host"),
        "calibration_sha256": run.calibration.get("tokens_sha256"),
        "commit": run.environment.get("git_commit"),
    }


def request(row: dict[str, Any]) -> tuple:
    """What two records of the same run have in common, wherever it was made."""
    return row["model"], row["method"], row["pattern"], row["target"], row["seed"]


class Rows(list[dict[str, Any]]):
    """Records that can be asked for."""

    def of(self, model: str, method: str, pattern: str, target: float) -> list[dict[str, Any]]:
        """One cell, its seeds."""
        wanted = model, method, pattern, target
        return [row for row in self if (row["model"], row["method"], row["pattern"], row["target"]) == wanted]

    def cell(self, model: str, method: str, pattern: str, target: float, key: str = "perplexity", digits: int = 2):
        """One cell as text."""
        return over_seeds([row[key] for row in self.of(model, method, pattern, target)], digits)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; lines without any value are left out."""
    return [*markdown_table(head, [line for line in lines if any(value != NONE for value in line[1:])]), ""]


def costs(rows: Rows, model: str, method: str) -> list[str]:
    """Processor seconds and peak memory over all unstructured targets."""
    own = [row for row in rows if (row["model"], row["method"], row["pattern"]) == (model, method, "unstructured")]
    seconds = [row["prune_processor_seconds"] for row in own if row["prune_processor_seconds"] is not None]
    peaks = [row["peak_host_bytes"] for row in own if row["peak_host_bytes"]]
    return [
        f"{statistics.mean(seconds):.1f} ± {statistics.stdev(seconds):.1f}" if len(seconds) > 1 else NONE,
        f"{statistics.mean(peaks) / 1e6:.0f} MB" if peaks else NONE,
    ]


def main() -> None:
    """Reads the runs, writes the files."""
    folders = [Path(argument) for argument in sys.argv[1:]] or [Path("outputs/best"), Path("outputs/budgets")]
    paths = [path.parent for folder in folders for path in sorted(folder.rglob("results.json"))]
    rows = Rows(kept_records(HERE / "results.json", (record(read_run(path)) for path in paths), request))
    (HERE / "tables.md").write_text("\n".join(tables(rows)), encoding="utf-8")
    draw(rows, HERE / "perplexity.png")
    print((HERE / "tables.md").read_text(encoding="utf-8"))


def draw(rows: Rows, path: Path) -> None:
    """Perplexity over dense against sparsity; mean and spread over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shown = ("wanda", "sparsegpt", "besa", "sparsegpt+reconstruct", "best")
    looks = styles(list(shown))
    figure, axes = pyplot.subplots(1, len(MODELS), figsize=(13, 4))
    for axis, model in zip(axes, MODELS, strict=True):
        (dense,) = (row["perplexity"] for row in rows.of(model, "dense", "unstructured", 0.0))
        for method in shown:
            cells = [
                (x, [row["perplexity"] / dense for row in rows.of(model, method, "unstructured", x)]) for x in TARGETS
            ]
            there = [(x, values) for x, values in cells if values]
            means = [statistics.mean(values) for _, values in there]
            around = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in there]
            look = looks[method]
            axis.errorbar(
                [x for x, _ in there], means, around, label=method, color=look.light, marker=look.marker, capsize=2
            )
        axis.set(title=model, xlabel="sparsity", xticks=TARGETS, yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("held-out perplexity over dense")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def under(budget: str, pruner: str) -> str:
    """The method's label. Uniform is what a pruner does without a budget."""
    name, *settings = budget.split(", ")
    return pruner if budget == "uniform" else ", ".join([f"{name}+{pruner}", *settings])


def tables(rows: Rows) -> list[str]:
    """All tables."""
    names = [name for name, *_ in COLUMNS]
    lines = ["Mean ± sample standard deviation over three seeds, or over as many as are told in brackets.", ""]
    for model in MODELS:
        dense = rows.cell(model, "dense", "unstructured", 0.0).partition(" ")[0]
        lines += [f"## Held-out perplexity, {model} (dense {dense})", ""]
        lines += table(
            ["method", *names, "processor s", "peak memory"],
            [[m, *(rows.cell(model, m, *column[1:]) for column in COLUMNS), *costs(rows, model, m)] for m in METHODS],
        )
    lines += ["## Accuracy on the first 200 questions of the embedded task (acc_norm)", ""]
    lines += table(
        ["method", *names],
        [
            [m, *(rows.cell("embedded", m, *column[1:], key="accuracy", digits=3) for column in COLUMNS)]
            for m in METHODS
        ],
    )
    lines += ["## best without one of its pieces, 70 %", ""]
    lines += table(
        ["", *MODELS],
        [
            [what, *(rows.cell(model, m, "unstructured", 0.7, digits=3) for model in MODELS)]
            for m, what in PIECES.items()
        ],
    )
    for target in TARGETS:
        lines += [f"## Budgets over depth, {target:.0%}", ""]
        head = ["budget", *(f"{model}: {pruner}" for model in MODELS for pruner in UNDER)]
        named = [
            [b, *(rows.cell(m, under(b, p), "unstructured", target) for m in MODELS for p in UNDER)] for b in BUDGETS
        ]
        lines += table(head, named)
    lines += ["## Cost of a budget with wanda, processor seconds of the block loop", ""]
    lines += table(["budget", *MODELS], [[b, *(costs(rows, m, f"{b}+wanda")[0] for m in MODELS)] for b in BUDGETS])
    return lines


if __name__ == "__main__":
    main()
