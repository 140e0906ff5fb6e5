"""Everything that is to be known of a GPU, in at most 8 minutes, in the order of its worth; one JSON.

    python experiments/benchmarks/bench_gpu.py               # one CUDA device: gpu.json beside this file
    python experiments/benchmarks/bench_gpu.py --toy --out toy.json   # on a CPU: does it run?

1. host syncs of BESA's steps, as CUDA's own sync debugging counts them (wanted: none);
2. every kernel against its reference: the largest difference, both times, the floor of the memory (`kernels.py`); and
   the selection from a long row against a sort;
3. a 7B and a 70B block and one of Qwen3-30B-A3B, 128 x 2048 tokens: Wanda, BESA, SparseGPT and best against their
   floors and the authors' way, with peak memory (`blocks.py`);
4. a streamed model of 32 random 7B blocks: the prune stage as a run has it, with its reading, hashing and writing.

A case begins only while there is time and is cut off when that is over; the file is written after each. Random weights
and inputs. Needs torch, transformers, safetensors, jaxtyping, psutil, and Triton for the kernels; without prodigyopt
the authors' way takes its steps with AdamW.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import authors_way
import blocks
import kernels
import torch
from machine import describe_machine

from besa_exp.blocks.activations import allocator
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.besa_reconstruct import BesaReconstruct
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.tensors.kernels import HAS_TRITON
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.selection import kth_smallest

HERE = Path(__file__).parent
MINUTES = 7.5  # for all cases; imports come before them
LLAMA = (
    blocks.Case("Llama-2-7B block", 4096, 11008, 32, 32, 128, 2048),
    blocks.Case("Llama-2-70B block", 8192, 28672, 64, 8, 128, 2048),
    blocks.Case("Qwen3-30B-A3B block", 2048, 768, 32, 4, 128, 2048, experts=128, chosen=8, head_dim=128),
)
TOY = (
    blocks.Case("toy block", 32, 48, 2, 1, 8, 16),
    blocks.Case("toy mixture", 32, 24, 2, 1, 8, 16, experts=4, chosen=2),
)
Result = dict[str, Any]


def best_floor(work: blocks.Work) -> None:
    """BESA's, and four epochs of bare steps."""
    blocks.besa_floor(work)
    for _ in range(BesaReconstruct().tuning.epochs):
        for sample in work.inputs.split(1):
            blocks.bare_step(work.blocks[0], sample)


METHODS: dict[str, tuple[Any, Callable[[blocks.Work], None], Callable[..., object] | None]] = {
    "besa": (Besa(), blocks.besa_floor, authors_way.learn_block),
    "sparsegpt": (SparseGPT(), blocks.two_passes, authors_way.sparsegpt_block),
    "wanda": (Uniform(), blocks.two_passes, None),
    "best": (BesaReconstruct(), best_floor, None),
}


def peak(device: torch.device, act: Callable[[], object]) -> Result:
    """Seconds, and the most memory of the device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = blocks.timed(device, act)
    return {"seconds": seconds} | (
        {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    )


def method(work: blocks.Work, theirs: blocks.Work | None, name: str) -> Result:
    """One method on one block, after a warm-up on few samples."""
    pruner, floor, authors = METHODS[name]
    device, few = work.inputs.device, blocks.replace(work, inputs=work.inputs[:8])
    blocks.prune(few, pruner)
    found: Result = {f"this {key}": value for key, value in peak(device, partial(blocks.prune, work, pruner)).items()}
    found["floor seconds"] = blocks.timed(device, partial(floor, work))
    if authors and theirs:
        try:
            their_own = peak(device, partial(blocks.authors, theirs, authors))
        except torch.OutOfMemoryError:
            return found | {"authors": "out of memory"}
        found |= {f"authors {key}": value for key, value in their_own.items()}
    return found


def syncs(work: blocks.Work) -> Result:
    """Warnings of CUDA's sync debugging over a block's steps, those between two looks at the probe alone, by what the
    host did; and launches are left to a profiler."""
    device, seen = work.inputs.device, []
    few = blocks.replace(work, inputs=work.inputs[:16])
    blocks.prune(few, Besa())

    def on_step(step: Any) -> None:
        seen.append(len(caught))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            blocks.prune(few, Besa(checks=1), on_step)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    where = [f"{Path(found.filename).name}:{found.lineno}" for found in caught[seen[0] : seen[-1]]]
    return {"steps": len(seen) - 1, "syncs": len(where), "where": sorted(set(where))}


def kernel(case: kernels.Case, shape: tuple[int, int], device: torch.device, bandwidth: float, rounds: int) -> Result:
    """Times, and the largest difference from the reference, relative to its largest number."""
    found = asdict(kernels.measure(case, shape, device, bandwidth, rounds))
    operation = case.kernel.split(",")[0]
    if HAS_TRITON and device.type == "cuda":
        mine, expected = (kernels.implementation(operation, suffix, case.arguments)() for suffix in ("_triton", ""))
        pairs = zip(*(value if isinstance(value, tuple) else (value,) for value in (mine, expected)), strict=True)
        found["largest difference"] = max(
            float((own.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30))
            for own, other in pairs
        )
    return found


def selection(device: torch.device, toy: bool) -> Result:
    """The k-th smallest by counting and by a sort, of as many numbers as a group of SparseGPT has in a 7B block, and as
    such a block and one of 70B have, from which best selects: milliseconds."""
    found: Result = {}
    for numbers in (256, 1024) if toy else (4096 * 128, 202_375_168, 855_638_016):
        values = torch.rand(numbers, device=device)
        ways = partial(kth_smallest, values, numbers // 2), partial(by_sorting, values, numbers // 2)
        equal = bool(ways[0]() == ways[1]())
        seen = (kernels.timed(way, device) for way in ways)
        found[str(numbers)] = {"equal": equal} | dict(zip(("counted", "sorted"), seen, strict=True))
    return found


def by_sorting(values: torch.Tensor, k: int) -> torch.Tensor:
    return values.sort().values[k - 1]


def whole(device: torch.device, toy: bool) -> Result:
    """The prune stage of a streamed model in a folder of its own."""
    import streaming

    from besa_exp.checkpoints.load import LoadedModel
    from besa_exp.checkpoints.streaming import open_streamed
    from besa_exp.run_folder.finished_blocks import FinishedBlocks
    from besa_exp.runs.block_loop import BlockLoop  # of all that is measured this alone needs more: accelerate, rich

    with tempfile.TemporaryDirectory() as place:
        model_folder, num_blocks = Path(place) / "model", 3 if toy else 32
        model_folder.mkdir()
        sizes = (32, 48, 2, 64, 16) if toy else (4096, 11008, 32, 32000, 2048)
        streaming.HIDDEN, streaming.FFN, streaming.HEADS, streaming.VOCABULARY, streaming.SEQ_LEN = sizes
        written = blocks.timed(device, lambda: streaming.write_model(model_folder, num_blocks, device))
        model, weights = open_streamed(model_folder, "bfloat16", device, False)
        loaded = LoadedModel(model, None, weights, model_folder)
        ids = torch.randint(0, sizes[3], (8 if toy else 128, sizes[4]), generator=torch.Generator().manual_seed(0))
        finished = FinishedBlocks(Path(place) / "blocks")
        finished.begin()
        loop = BlockLoop(loaded, ids, 1, finished, 0, allocator("device", device, Path(place), 0)[1])
        run = partial(loop.run, Besa(), Goal(0.5), None, lambda step: None, lambda report: None)
        return {"blocks": num_blocks, "seconds to write the model": written, **peak(device, run)}


def cases(device: torch.device, toy: bool) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Name and what measures it; what a case holds goes with it."""
    shapes = TOY if toy else LLAMA
    work = blocks.make_work(shapes[0], device, torch.float32 if toy else torch.bfloat16)
    yield "syncs of BESA's steps", partial(syncs, work)
    del work
    bandwidth = kernels.copy_bandwidth(device, 1 << (16 if toy else 30), 3)
    for shape in kernels.SMALL if toy else (kernels.LLAMA[1], kernels.LLAMA[5]):
        for case in kernels.cases(*shape, device):
            yield f"{case.kernel}, {shape[0]} x {shape[1]}", partial(kernel, case, shape, device, bandwidth, 5)
    yield "selection from a long row", partial(selection, device, toy)
    for shape in shapes:
        make = partial(blocks.make_work, shape, device, torch.float32 if toy else torch.bfloat16)
        work, theirs = make(), None if shape.experts else blocks.stock(make())  # whose code knows no mixture
        for name in METHODS:
            yield f"{shape.name}, {name}", partial(method, work, theirs, name)
        del work, theirs
        if shape is shapes[0]:
            yield "streamed model", partial(whole, device, toy)


def within(seconds: float, measure: Callable[[], Result]) -> Result:
    """What is measured, or why it was not: no time, or a failure, that of a case that takes longer among them."""
    if seconds <= 0:
        return {"not run": "no time was left"}

    def cut_off(number: int, frame: object) -> None:
        raise TimeoutError("the time was over")

    before = signal.signal(signal.SIGALRM, cut_off)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return measure()
    except Exception:  # noqa: BLE001 - one case that fails must not cost the others
        return {"failed": traceback.format_exc(limit=-3)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny shapes on a CPU, to see that everything runs")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--out", type=Path, default=HERE / "gpu.json")
    arguments = parser.parse_args()
    device, began = torch.device("cpu" if arguments.toy else "cuda"), time.perf_counter()
    triton = importlib.import_module("triton").__version__ if HAS_TRITON else None
    record: Result = {"machine": describe_machine(device) | {"cuda": torch.version.cuda, "triton": triton}, "cases": {}}
    for name, measure in cases(device, arguments.toy):
        found = within(60 * arguments.minutes - (time.perf_counter() - began), measure)
        record["cases"][name] = found
        record["seconds"] = time.perf_counter() - began
        print(f"{record['seconds']:.0f} s: {name}: {found}", flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
