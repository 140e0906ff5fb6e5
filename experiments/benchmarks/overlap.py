"""What it brings that a streamed run reads, hashes and writes beside its pruning: the same loop with and without.

    python experiments/benchmarks/overlap.py [--rounds 5] [--blocks 8] [--threads 2]

A random Llama in bf16 (hidden 1024, ffn 2816: 26 MB a block), pruned by Wanda and by BESA on few tokens, so that the
files weigh. A round runs both ways, one after the other, in alternating order; the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import streaming
import torch
from machine import describe_machine

from besa_exp.blocks.activations import allocator
from besa_exp.checkpoints import streaming as streamed
from besa_exp.checkpoints.load import LoadedModel
from besa_exp.checkpoints.streaming import open_streamed
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.run_folder.finished_blocks import FinishedBlocks
from besa_exp.runs import block_loop
from besa_exp.tensors.masks import Goal

HERE, CPU = Path(__file__).parent, torch.device("cpu")
SIZES = (1024, 2816, 16, 1000, 64)
BESIDE = streamed.ahead, block_loop.one_at_a_time


def in_turn(make: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """As `ahead`, when it is asked."""
    return (make(item) for item in items)


@contextmanager
def at_once() -> Iterator[Callable[[Callable[[], object]], object]]:
    """As `one_at_a_time`, before it returns."""
    yield lambda act: act()


def seconds(folder: Path, pruner: Any, beside: bool) -> float:
    """Of the block loop, everything on the disk at its end."""
    streamed.ahead, block_loop.one_at_a_time = BESIDE if beside else (in_turn, at_once)
    model, weights = open_streamed(folder, "float32", CPU, False)
    ids = torch.randint(0, SIZES[3], (8, SIZES[4]), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        finished = FinishedBlocks(Path(place))
        finished.begin()
        loaded, allocate = LoadedModel(model, None, weights, folder), allocator("device", CPU, folder, 0)[1]
        loop = block_loop.BlockLoop(loaded, ids, 8, finished, 0, allocate)
        began = time.perf_counter()
        loop.run(pruner, Goal(0.5), None, lambda step: None, lambda report: None)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {"machine": describe_machine(CPU), "blocks": arguments.blocks, "rounds": arguments.rounds}
    streaming.HIDDEN, streaming.FFN, streaming.HEADS, streaming.VOCABULARY, streaming.SEQ_LEN = SIZES
    with tempfile.TemporaryDirectory() as place:
        streaming.write_model(Path(place), arguments.blocks)
        for name, pruner in (("wanda", Uniform()), ("besa", Besa())):
            pairs = []
            for number in range(arguments.rounds):
                order = (True, False) if number % 2 else (False, True)
                found = {beside: seconds(Path(place), pruner, beside) for beside in order}
                pairs.append((found[False], found[True]))
            ratio = statistics.median(before / after for before, after in pairs)
            record[name] = {"in turn, beside: seconds": pairs, "ratio": ratio}
            print(f"{name}: {ratio:.2f} x, {[(round(a, 2), round(b, 2)) for a, b in pairs]}", flush=True)
    (HERE / "overlap.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
