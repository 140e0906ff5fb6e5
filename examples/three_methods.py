"""Prune the embedded model with three methods and one of our own, compare perplexity, and plot what each did.

    python examples/three_methods.py [FIGURE.png]

It needs no network, no account and no GPU. The same steps, cell by cell, are in three_methods.ipynb.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import torch
from matplotlib import pyplot

import besa_exp
from besa_exp.blocks.pruner import PrunedBlock, Task, Traits, pruned_by_masks
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.tensors.masks import keep_per_row
from besa_exp.texts.embedded.text import embedded_text

METHODS = ("magnitude", "wanda", "besa")
CALIBRATION: dict[str, Any] = {"num_samples": 16, "seq_len": 128, "batch_size": 8}


@dataclass(frozen=True)
class Random:
    """Our own pruner: it prunes the same number of weights in every row, drawn at random."""

    seed: int = 0
    traits = Traits()  # what the block loop has to know: it observes nothing and follows the defaults

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """It takes any target."""
        return []

    def prune_block(self, task: Task) -> PrunedBlock:
        """A keep mask for each linear of the block."""
        generator = torch.Generator().manual_seed(self.seed + task.block.index)
        drawn = {name: torch.rand(weight.shape, generator=generator) for name, weight in task.weights.items()}
        return pruned_by_masks({name: keep_per_row(importance, task.goal) for name, importance in drawn.items()})


def held_out_tokens(tokenizer, num_tokens: int) -> torch.Tensor:
    """Tokens of embedded text that calibration never sees."""
    text = "\n\n".join(embedded_text("held_out").documents[:20])
    return torch.tensor(tokenizer(text)["input_ids"][:num_tokens])


def compared(methods, num_tokens: int = 8192, sparsity: float = 0.5) -> tuple[dict, float]:
    """For each method its report and the perplexity of the pruned model; the perplexity of the dense model."""
    model, tokenizer = besa_exp.load_model("embedded")
    tokens = held_out_tokens(tokenizer, num_tokens)
    dense = perplexity(model, tokens, window=256, batch_size=8).value
    found = {}
    for name, pruner in methods.items():
        model, tokenizer = besa_exp.load_model("embedded")
        report = besa_exp.prune(model, tokenizer, "embedded", pruner=pruner, sparsity=sparsity, **CALIBRATION)
        found[name] = report, perplexity(model, tokens, window=256, batch_size=8).value
    return found, dense


def plot(found: dict, path: Path) -> None:
    """The loss of each block, and the zeros of each linear, by method."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, (report, _) in found.items():
        left.plot(report.losses, marker="o", label=name)
        by_linear = report.to_pandas().groupby("linear", sort=False)[["pruned", "weights"]].sum()
        right.plot(by_linear.pruned / by_linear.weights, marker="o", label=name)
    left.set(xlabel="block", ylabel="reconstruction loss", yscale="log")
    right.set(ylabel="sparsity")
    right.tick_params(axis="x", rotation=45)
    left.legend()
    figure.savefig(path)
    pyplot.close(figure)


def main(path: Path) -> None:
    found, dense = compared({**{name: name for name in METHODS}, "random": Random()})
    print(f"{'dense':<10} perplexity {dense:8.2f}")
    for name, (report, value) in found.items():
        print(f"{name:<10} perplexity {value:8.2f}   {100 * report.sparsity:.2f} % zeros")
    plot(found, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "three_methods.png"))
