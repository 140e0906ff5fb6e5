"""Runs the study, one `besa prune` after the other in one process; what is done is skipped.

Small models lose 10 % of their parameters, one block, and two; the real one 10, 20 and 30 %. Of the same size: whole
blocks, heads and channels, and zeros in all linears, so many that as few weights are not zero. Then Barber after Wanda,
skipped FFNs, a structure and then zeros, the policy gradient's search, and models that are tuned afterwards.

    python experiments/structure/run.py MODEL... [--runs outputs/structure] [--seeds 0 1 2]
                                                                 embedded, babyllama, stories260k, smollm2

after `experiments/tokens.py first_results`, which makes the tokens of babyllama and stories260k, and, for smollm2,
`make real-model` and `experiments/tokens.py real_model`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from besa_exp.cli.main import main

SHARED = ["evaluator=perplexity", "tracker=none", "save.verify=false", "save.model=false", "save.masks=false"]


@dataclass(frozen=True)
class Bed:
    """A model, how it is asked for, and what is taken out of it."""

    words: tuple[str, ...]
    parameters: int
    block: int  # parameters of one
    linears: int  # parameters of the linears in all blocks
    sizes: dict[str, int]  # whole blocks that come nearest to each size; 0: none does
    recovery: tuple[str, ...]
    sleb: tuple[str, ...] = ()
    search: tuple[str, ...] = ("structure.steps=75", "calibration.batch_size=8")


SIZES = {"10%": 0, "one": 1, "two": 2}
TUNED = ("recovery=full", "recovery.steps=70", "recovery.micro_batch=8")
ON_STORIES = "recovery.path=outputs/first_results/tokens/{}/tuning.safetensors"
REAL = "outputs/real_model/tokens/calibration-small-${seed}.safetensors"
EMBEDDED = ("testbed=embedded", "evaluator.perplexity_sets=[embedded]", "calibration.num_samples=32")
BABYLLAMA = (*TUNED, ON_STORIES.format("babyllama-105"))
STORIES260K = (*TUNED, ON_STORIES.format("stories260K"))
BEDS = {
    "embedded": Bed(EMBEDDED, 2_361_408, 393_600, 1_966_080, SIZES, TUNED),
    "babyllama": Bed(("testbed=babyllama",), 936_448, 184_576, 921_600, SIZES, BABYLLAMA),
    "stories260k": Bed(("testbed=stories260k",), 260_032, 45_440, 226_560, SIZES, STORIES260K),
    # A pass over the calibration tokens takes a minute of a core: a search gets fewer.
    "smollm2": Bed(
        ("experiment=real_model", "hydra.mode=RUN"),
        134_515_008,
        3_540_096,
        106_168_320,
        {"10%": 4, "20%": 8, "30%": 11},
        (
            "recovery=full",
            "recovery.path=${oc.env:BESA_SHARED,../shared}/data/wikitext2/wiki.valid.raw",
            "recovery.steps=24",
            "recovery.seq_len=512",
            "recovery.micro_batch=8",
            "recovery.held_out=8",
            "recovery.checks=4",
        ),
        sleb=(f"calibration.path={REAL}",),
        search=("structure.steps=10", "calibration.batch_size=8"),
    ),
}


def study(bed: Bed, seed: int) -> Iterator[list[str]]:
    """The arguments of each run, the cheapest claims first."""
    if seed == 0:
        yield ["pruner=dense"]
    shares = {name: (blocks * bed.block / bed.parameters) or 0.1 for name, blocks in bed.sizes.items()}
    zeros = {name: f"sparsity={share * bed.parameters / bed.linears:.4f}" for name, share in shares.items()}
    whole = {name: f"structure.blocks={blocks}" for name, blocks in bed.sizes.items() if blocks}
    for size in bed.sizes:
        for name in ("shortgpt", "angular") if size in whole else ():
            yield [f"structure={name}", whole[size], "pruner=dense"]
        for name in ("wanda_sp", "magnitude_sp", "random_sp"):
            yield [f"structure={name}", f"structure.ratio={shares[size]:.4f}", "pruner=dense"]
        yield ["pruner=wanda", zeros[size]]
    for skipping in ("ffn", "static", "random"):
        yield ["pruner=dense", f"skipping={skipping}"]
    for skipping in ("ffn", "random"):  # the first tokens of a window, which large models make much of, never skip
        yield ["pruner=dense", f"skipping={skipping}", "skipping.warm_tokens=25"]
    for update in ([], ["update=barber"]):
        yield ["pruner=wanda", *update, "sparsity=0.5"]
    size = next(iter(whole))
    share, removed = f"structure.ratio={shares[size]:.4f}", bed.sizes[size] * bed.block
    for part, shape in [*((one, "uneven") for one in shares.values()), (shares[size], "uniform")]:
        searched = [f"structure.ratio={part:.4f}", f"structure.shape={shape}", *bed.search]
        yield ["structure=policy_gradient", *searched, "pruner=dense"]
    for size_of_sleb in whole:
        yield ["structure=sleb", whole[size_of_sleb], "pruner=dense", *bed.sleb]
    for first in (["structure=shortgpt", whole[size]], ["structure=wanda_sp", share], []):  # []: the text's part in it
        yield [*first, "pruner=dense", *bed.recovery]
    yield ["pruner=wanda", zeros[size], *bed.recovery]
    for size_of_besa in reversed(bed.sizes):
        yield ["pruner=besa", zeros[size_of_besa]]
    as_many = f"sparsity={removed / (bed.linears - removed):.4f}"  # zeros in what is left as weights have gone
    yield ["structure=shortgpt", whole[size], "pruner=besa", as_many]


def run(model: str, words: list[str], seed: int, runs: Path) -> None:
    """Ends the program where a run fails."""
    name = "-".join([*(word.partition("=")[2].rpartition("/")[2] for word in words), str(seed)])
    own = [*BEDS[model].words, *SHARED, *words, f"seed={seed}", f"hydra.run.dir={runs / model / name}"]
    if code := main(["prune", *own]):
        sys.exit(code)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=BEDS)
    parser.add_argument("--runs", type=Path, default=Path("outputs/structure"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    for model in asked.models:
        for seed in asked.seeds:
            for words in study(BEDS[model], seed):
                run(model, words, seed, asked.runs)
