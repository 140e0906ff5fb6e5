"""Runs the study, one `besa prune` after the other in one process; what is done is skipped.

At the size of one block less and of two, and with 10 % of the parameters gone: whole blocks, heads and channels, and
zeros in all linears, so many that as few weights are not zero. Then Barber after Wanda, skipped FFNs, zeros in what is
left of a model without a block, and the policy gradient's search.

    python experiments/structure/run.py MODEL... [--runs outputs/structure]     embedded, babyllama, stories260k

after `experiments/tokens.py first_results`, which makes the tokens of all but the embedded model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from besa_exp.cli.main import main

# Parameters of the model, of a block, and of the linears in all blocks.
SIZES = {
    "embedded": (2_361_408, 393_600, 1_966_080),
    "babyllama": (936_448, 184_576, 921_600),
    "stories260k": (260_032, 45_440, 226_560),
}
SHARED = ["evaluator=perplexity", "tracker=none", "save.verify=false", "save.model=false", "save.masks=false"]
SEEDS = (0, 1, 2)
CALIBRATED = "calibration.num_samples=32"


def study(model: str) -> Iterator[list[str]]:
    """The arguments of each run, the cheapest claims first."""
    parameters, block, linears = SIZES[model]
    yield ["pruner=dense"]
    shares = {"10": 0.1, "one": block / parameters, "two": 2 * block / parameters}
    for seed in SEEDS:
        for blocks in (1, 2):
            for name in ("sleb", "shortgpt", "angular"):
                yield [f"structure={name}", f"structure.blocks={blocks}", "pruner=dense", f"seed={seed}"]
        for size in ("one", "two", "10"):
            sparsity = f"sparsity={shares[size] * parameters / linears:.4f}"
            yield ["structure=wanda_sp", f"structure.ratio={shares[size]:.4f}", "pruner=dense", f"seed={seed}"]
            yield ["pruner=wanda", sparsity, f"seed={seed}"]
        for update in ([], ["update=barber"]):
            yield ["pruner=wanda", *update, "sparsity=0.5", f"seed={seed}"]
        for skipping in ("ffn", "static", "random"):
            yield ["pruner=dense", f"skipping={skipping}", f"seed={seed}"]
        for size in ("one", "two", "10"):
            sparsity = f"sparsity={shares[size] * parameters / linears:.4f}"
            yield ["pruner=besa", sparsity, f"seed={seed}"]
            for name in ("random_sp", "magnitude_sp"):
                yield [f"structure={name}", f"structure.ratio={shares[size]:.4f}", "pruner=dense", f"seed={seed}"]
        zeros = f"sparsity={block / (linears - block):.4f}"  # as many as the block that went before had weights
        yield ["structure=sleb", "structure.blocks=1", "pruner=besa", zeros, f"seed={seed}"]
        for shape in ("uniform", "uneven"):
            searched = ["structure=policy_gradient", f"structure.ratio={shares['one']:.4f}", f"structure.shape={shape}"]
            search = ["structure.steps=75", "structure.rate=0.4", "calibration.batch_size=8"]
            yield [*searched, *search, "pruner=dense", f"seed={seed}"]


def run(model: str, words: list[str], runs: Path) -> None:
    """Ends the program where a run fails."""
    name = "-".join(word.partition("=")[2] for word in words)
    where = f"hydra.run.dir={runs / model / name}"
    scored = ["evaluator.perplexity_sets=[embedded]"] if model == "embedded" else []
    if code := main(["prune", f"testbed={model}", *SHARED, *scored, *words, CALIBRATED, where]):
        sys.exit(code)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=SIZES)
    parser.add_argument("--runs", type=Path, default=Path("outputs/structure"))
    asked = parser.parse_args()
    for model in asked.models:
        for words in study(model):
            run(model, words, asked.runs)
