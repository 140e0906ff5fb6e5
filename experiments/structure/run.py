"""Runs the study: each method at the same number of parameters, one command after the other in one process.

python experiments/structure/run.py [--runs outputs/structure]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from besa_exp.cli.main import main

SHARED = [
    "evaluator=perplexity",
    "evaluator.perplexity_sets=[embedded]",
    "tracker=none",
    "save.verify=false",
    "save.model=false",
    "save.masks=false",
]
SHARED += ["calibration.num_samples=32", "calibration.seq_len=256"]
METHODS = ("shortgpt", "angular", "sleb", "magnitude_sp", "wanda_sp", "random_sp")
RATIO = "0.1667"  # one of five blocks


def commands() -> list[list[str]]:
    """The arguments of each run."""
    alone = [[f"structure={name}", f"structure.ratio={RATIO}", "pruner=dense"] for name in METHODS]
    return [["pruner=dense"], *alone]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("outputs/structure"))
    folder = parser.parse_args().runs
    for words in commands():
        name = "-".join(word.partition("=")[2] for word in words)
        code = main(["prune", *SHARED, *words, f"hydra.run.dir={folder / name}"])
        if code:
            sys.exit(code)
