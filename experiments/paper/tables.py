"""The study's tables, as Markdown, from the records that collect.py keeps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import combinations

from besa_exp.display.markdown import markdown_table
from besa_exp.report.studies import over_seeds

MODELS = ("babyllama-105", "stories260K", "embedded")
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
USUAL = (None, 32)  # the calibration set of all that does not vary it: so many windows of the model's own text
PAPER = "besa_paper"
LAYER_WISE = f"{PAPER}, granularity=linear, dense_targets=true, d_coef=50"
METHODS = ("dense", "wanda", "sparsegpt", LAYER_WISE, PAPER, "besa_linear", "besa")
ABLATIONS = {
    "Granularity": [PAPER, f"{PAPER}, granularity=linear", LAYER_WISE],
    "Epochs, 16 windows": [PAPER, *(f"{PAPER}, epochs={epochs}" for epochs in (3, 10, 30))],
    "Sparsity step": [f"{PAPER}, sparsity_step=0.1", PAPER, f"{PAPER}, sparsity_step=0.001"],
    "Importance": [f"{PAPER}, metric=Weight", PAPER, f"{PAPER}, metric=SparseGPT"],
    "Scope, with besa": ["besa, scope=sub_block", "besa", "besa, scope=pair"],
}
SIZES = (8, 16, 32, 64)
SOURCES = ("tinystories", "c4", "wikitext2", "embedded")


def short(label: str) -> str:
    """The layer-wise run by its name."""
    return f"{PAPER} layer-wise" if label == LAYER_WISE else label


def source_and_windows(model: str, source: str | None = USUAL[0], windows: int = USUAL[1]) -> list[str | int]:
    """As records hold it; without a source, the model's own text."""
    return [source or ("embedded" if model == "embedded" else "tinystories"), windows]


def chosen(rows: Sequence[dict], model: str, method: str, calibration: tuple[str | None, int] = USUAL) -> list[dict]:
    """The records of one cell, its seeds."""
    wanted = source_and_windows(model, *calibration)
    return [row for row in rows if (row["model"], row["method"], row["calibration"]) == (model, method, wanted)]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Markdown and an empty line."""
    return [*markdown_table(head, lines), ""]


def cells(own: Sequence[dict]) -> list[str]:
    """Zeros, perplexity, the error of the last hidden states, accuracy."""
    wrong = [row["error"][-1] for row in own if "error" in row]
    zeros = f"{statistics.mean(row['measured'] for row in own):.1%}" if own else "n/a"
    right = [row["accuracy"] for row in own if "accuracy" in row]
    return [zeros, over_seeds([row["perplexity"] for row in own], 2), over_seeds(wrong, 3), over_seeds(right, 3)]


HEAD = ("zeros", "perplexity", "error at the end", "zero-shot accuracy")


def variants(rows: Sequence[dict], named: Sequence[tuple], first: str) -> list[str]:
    """All models, a line for each (name, method, calibration)."""
    lines = []
    for model in MODELS:
        lines += [[model, name, *cells(chosen(rows, model, *cell))] for name, *cell in named]
    return table(("model", first, *HEAD), lines)


def along_depth(rows: Sequence[dict], value: Callable[[dict], list[float]]) -> list[str]:
    """A line for each method, a column for each block."""
    lines = []
    for model in MODELS:
        for method in METHODS[1:]:
            blocks = zip(*(value(row) for row in chosen(rows, model, method) if "error" in row), strict=True)
            lines.append([model, short(method), *(f"{statistics.mean(block):.4f}" for block in blocks)])
    return table(("model", "method", *(f"block {number}" for number in range(5))), lines)


def allocation(rows: Sequence[dict]) -> list[str]:
    """By linear: mean and range over blocks of the mean over seeds, and how far the seeds agree."""
    lines = []
    for model in MODELS:
        for method in (PAPER, "besa_linear", "besa"):
            own = chosen(rows, model, method)
            if own:
                lines.append([model, method, *(allocated(own, linear) for linear in LINEARS), agreement(own)])
    return table(("model", "method", *LINEARS, "seeds' correlation"), lines)


def allocated(own: Sequence[dict], linear: str) -> str:
    """Mean sparsity of a linear, with the lowest and highest block."""
    by_block = zip(*([block[linear] for block in row["sparsity"]] for row in own), strict=True)
    blocks = [statistics.mean(block) for block in by_block]
    return f"{statistics.mean(blocks):.3f} ({min(blocks):.2f} to {max(blocks):.2f})"


def agreement(own: Sequence[dict]) -> str:
    """The mean correlation of two seeds' sparsities over all linears."""
    flat = [[block[linear] for block in row["sparsity"] for linear in LINEARS] for row in own]
    pairs = [statistics.correlation(one, other) for one, other in combinations(flat, 2)]
    return f"{statistics.mean(pairs):.2f}" if pairs else "n/a"


def speed(rows: Sequence[dict]) -> list[str]:
    """SIMULATED speed-up by linear."""
    lines = []
    for model in MODELS:
        for method in METHODS[1:]:
            own = chosen(rows, model, method)
            by_linear = ([row["simulated_speed_up"][linear] for row in own] for linear in (*LINEARS, "all"))
            lines.append([model, short(method), *(over_seeds(values, 2) for values in by_linear)])
    return table(("model", "method", *LINEARS, "all"), lines)


def tables(rows: Sequence[dict]) -> str:
    """All of them."""
    lines = ["Mean ± sample standard deviation over three seeds, or over as many as are told in brackets.", ""]
    lines += ["## Methods at 50 %", "", *variants(rows, [(short(m), m, USUAL) for m in METHODS], "method")]
    for title, methods in ABLATIONS.items():
        calibration = (None, 16) if "16 windows" in title else USUAL
        lines += [f"## {title}", "", *variants(rows, [(short(m), m, calibration) for m in methods], "method")]
    sizes = [(str(size), PAPER, (None, size)) for size in SIZES]
    sources = [(source, PAPER, (source, 32)) for source in SOURCES]
    lines += ["## Calibration windows (besa_paper)", "", *variants(rows, sizes, "windows")]
    lines += ["## Calibration source (besa_paper)", "", *variants(rows, sources, "source")]
    lines += ["## Error of the hidden states against the dense model", "", *along_depth(rows, lambda row: row["error"])]
    own_loss = along_depth(rows, lambda row: [after for _, after in row["loss"]])
    lines += ["## Reconstruction loss of each block on its own inputs", "", *own_loss]
    lines += ["## Allocated sparsity by linear", "", *allocation(rows)]
    lines += ["## Speed-up, SIMULATED (ViTCoD cycle model, nothing is measured)", "", *speed(rows)]
    return "\n".join(lines)
