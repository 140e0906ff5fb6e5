"""Compares the two baselines of the policy gradient at equal forwards, over seeds, and both with what they begin with.

A step draws two masks and measures each on 2 windows of 64 tokens. What is decided in the end is cut out of the model,
whose perplexity is that of the first 50 held-out windows. Prints a Markdown table and writes estimator.json.

    python experiments/structure/estimator.py [--model stories260K] [--shared ../shared]   after tokens.py first_results
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.head import head_of
from besa_exp.checkpoints.load import load_model
from besa_exp.checkpoints.narrowed_model import costs_of_model, dimensions_of_model, narrowed_model
from besa_exp.display.markdown import markdown_table
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.structure.method import DenseModel
from besa_exp.methods.structure.policy_gradient import PolicyGradient
from besa_exp.report.studies import over_seeds
from besa_exp.settings import ModelSettings
from besa_exp.texts.tokens import read_token_file

HERE = Path(__file__).parent
TOKENS = Path("outputs/first_results/tokens")
STEPS, RATES, SEEDS, RATIO = 300, (0.02, 0.1), (0, 1, 2), 0.1747  # of the parameters: one block of stories260K
BATCH, LENGTH = 2, 64


def dense_model(model, ids: torch.Tensor) -> DenseModel:
    """The model as a structure method sees it."""
    blocks = capture_blocks(model, ids)
    return DenseModel(
        lambda: blocks,
        lambda: embed(model, blocks, ids, 16),
        lambda: head_of(model, blocks, ids),
        ids,
        costs_of_model(model),
        dimensions_of_model(model),
        BATCH,
    )


def chosen_perplexity(model, name: str, seed: int, **settings) -> float:
    """Of what a search keeps."""
    ids = read_token_file(TOKENS / name / f"calibration-{seed}.safetensors")[:64, :LENGTH]
    with tempfile.TemporaryDirectory() as work:
        method = PolicyGradient(RATIO, seed=seed, **settings)
        structure = method.choose(dense_model(model, ids), Progress(Path(work) / "search.json"), lambda text: None)
    held_out = read_token_file(TOKENS / name / "held-out.safetensors")[:50]
    return perplexity(narrowed_model(model, structure), held_out, held_out.shape[1], 25).value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("BESA_SHARED", "../shared")))
    asked = parser.parse_args()
    settings = ModelSettings(asked.model, str(asked.shared / "models" / asked.model))
    model = load_model(settings, torch.device("cpu"), offline=True).model
    tried = {"start": {"steps": 1, "rate": 1e-9}}
    for rate in RATES:
        for baseline in ("leave_one_out", "moving"):
            tried[f"{baseline}, first step {rate}"] = {"steps": STEPS, "rate": rate, "baseline": baseline}
    found: dict[str, list[float]] = {name: [] for name in tried}
    for seed in SEEDS:
        for name, keys in tried.items():
            found[name].append(chosen_perplexity(model, asked.model, seed, **keys))
            print(seed, name, f"{found[name][-1]:.3f}", file=sys.stderr, flush=True)
            (HERE / "estimator.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    rows = [[name, over_seeds(values, 3)] for name, values in found.items()]
    print("\n".join(markdown_table(["policy gradient", "perplexity"], rows, numbers=True)))


if __name__ == "__main__":
    main()
