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
RATIOS = ("0.1667", "0.3333")  # one block of five, and two
METHODS = {
    "shortgpt": (["structure=shortgpt", "structure.ratio={ratio}"], True),
    "angular": (["structure=angular", "structure.ratio={ratio}"], True),
    "sleb": (["structure=sleb", "structure.ratio={ratio}"], True),
    "magnitude_sp": (["structure=magnitude_sp", "structure.ratio={ratio}"], True),
    "wanda_sp": (["structure=wanda_sp", "structure.ratio={ratio}"], True),
    "random_sp": (["structure=random_sp", "structure.ratio={ratio}"], True),
    "policy_gradient": (
        ["structure=policy_gradient", "structure.ratio={ratio}", "structure.steps=100", "structure.rate=0.02"],
        False,
    ),
}


def commands() -> list[list[str]]:
    """The arguments of each run; the searches that take longest come last, at the smaller ratio alone."""
    alone = [
        [*(word.format(ratio=ratio) for word in words), "pruner=dense"]
        for ratio in RATIOS
        for words, both in METHODS.values()
        if both or ratio == RATIOS[0]
    ]
    after = [["structure=sleb", "structure.ratio=0.1667", "pruner=wanda"], ["pruner=wanda"]]
    return [["pruner=dense"], *alone, *after]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("outputs/structure"))
    folder = parser.parse_args().runs
    for number, words in enumerate(commands()):
        name = "-".join(word.partition("=")[2] for word in words)
        code = main(["prune", *SHARED, *words, f"hydra.run.dir={folder / f'{number:02d}-{name}'}"])
        if code:
            sys.exit(code)
