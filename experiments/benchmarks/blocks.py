"""Benchmarks of one block: each method against its floor and the authors' way, in the same run.

    python experiments/benchmarks/blocks.py                 # CPU shapes; --device cuda: Llama-2-7B and 70B shapes

A floor is what no implementation of the method can avoid: passes of the same block, dense, over the same samples. Each
round runs everything once, one after the other; a cell is the median over rounds, a ratio the median of the
rounds' ratios. Weights and inputs are random. Needs torch, transformers and jaxtyping alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import authors_way
import torch
from machine import describe_machine
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from besa_exp.blocks import Block, capture_blocks
from besa_exp.importance import inverse_factor
from besa_exp.masks import Target
from besa_exp.pruners.besa import Besa
from besa_exp.pruners.sparsegpt import SparseGPT
from besa_exp.pruners.wanda import Wanda
from besa_exp.pruning import Pruner, prune_blocks
from besa_exp.statistics import Hessian

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """A Llama block's sizes and the calibration samples it is given."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    samples: int
    seq_len: int


CPU = (
    Case("768 / 2048, 512 tokens", 768, 2048, 12, 12, 32, 512),
    Case("768 / 2048, 2048 tokens", 768, 2048, 12, 12, 8, 2048),
    Case("2048 / 5632, 512 tokens", 2048, 5632, 16, 16, 8, 512),
    Case("2048 / 5632, 2048 tokens", 2048, 5632, 16, 16, 4, 2048),
)
CUDA = (
    Case("Llama-2-7B block", 4096, 11008, 32, 32, 128, 2048),
    Case("Llama-2-70B block", 8192, 28672, 64, 8, 128, 2048),
)


@dataclass(frozen=True)
class Cell:
    """One line: seconds of this project, of the floor and of the authors' way, and their ratios."""

    case: str
    what: str
    seconds: float
    floor: float | None
    ratio: float | None
    authors: float | None = None
    authors_ratio: float | None = None
    peak_bytes: int | None = None


def make_block(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Block, Tensor]:
    """A block with random weights on `device`, and random inputs for it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=case.hidden,
        intermediate_size=case.ffn,
        num_hidden_layers=1,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=case.seq_len,
        attn_implementation="sdpa",
    )
    with device:
        model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    block = capture_blocks(model, torch.zeros(case.samples, case.seq_len, dtype=torch.long))[0]
    inputs = torch.randn(case.samples, case.seq_len, case.hidden, device=device, dtype=dtype)
    return block, inputs * torch.rand(case.hidden, device=device, dtype=dtype)  # channels of unequal size, as in life


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, work: Callable[[], object]) -> float:
    started = clock(device)
    work()
    return clock(device) - started


def median_gap(moments: list[float]) -> float:
    """The usual time between two steps; those that also did something else are outvoted."""
    return statistics.median(later - sooner for sooner, later in itertools.pairwise(moments))


def prune(block: Block, inputs: Tensor, pruner: Pruner) -> list[float]:
    """The block loop on this one block, which is put back afterwards. The moments of its steps."""
    dense = {name: linear.weight.detach().clone() for name, linear in block.linears.items()}
    moments: list[float] = []
    device = inputs.device
    for _ in prune_blocks([block], inputs.clone(), pruner, Target(0.5), 1, lambda step: moments.append(clock(device))):
        pass
    for name, linear in block.linears.items():
        linear.weight.detach().copy_(dense[name])
    return moments


def bare_steps(block: Block, inputs: Tensor) -> list[float]:
    """Forward and backward of the dense block: gradients to its weights and inside it, none to its inputs."""
    weights = {name: linear.weight.detach().requires_grad_() for name, linear in block.linears.items()}
    gradient = torch.randn_like(inputs[:1])
    moments = []
    for sample in inputs.split(1):
        torch.autograd.grad(block(sample, weights), list(weights.values()), gradient)
        moments.append(clock(inputs.device))
    return moments


def besa_round(block: Block, inputs: Tensor) -> dict[str, float]:
    """One round of all that concerns BESA, in seconds."""
    device = inputs.device
    moments: dict[str, list[float]] = {}

    def keep(name: str, work: Callable[[], list[float]]) -> Callable[[], None]:
        return lambda: moments.update({name: work()})

    seconds = {
        "floor": timed(device, lambda: (block.outputs(inputs, 1), bare_steps(block, inputs), block.outputs(inputs, 1))),
        "ours": timed(device, keep("ours", lambda: prune(block, inputs, Besa()))),
        "authors": timed(device, keep("authors", lambda: authors_way.learn_block(block, inputs))),
    }
    steps = {name: median_gap(values) for name, values in moments.items()} | {
        "floor": median_gap(bare_steps(block, inputs))
    }
    return {f"{name} block": value for name, value in seconds.items()} | {
        f"{name} step": value for name, value in steps.items()
    }


def wanda_round(block: Block, inputs: Tensor) -> dict[str, float]:
    device = inputs.device
    return {
        "floor": timed(device, lambda: (block.outputs(inputs, 1), block.outputs(inputs, 1))),
        "ours": timed(device, lambda: prune(block, inputs, Wanda())),
    }


def sparsegpt_round(block: Block, inputs: Tensor) -> dict[str, float]:
    device = inputs.device
    features: dict[str, Tensor] = {}
    authors_way.statistics(block, inputs[:1], lambda name, seen: features.update({name: seen}))
    distinct = {id(seen): seen for seen in features.values()}.values()

    def hessians_and_factors() -> None:
        for seen in distinct:
            hessian = Hessian(seen.shape[-1], device)
            for _ in inputs:
                hessian.add(seen, 1)
            inverse_factor(hessian.matrix, 0.01, "benchmark")

    def authors_hessians_and_factors() -> None:
        for seen in features.values():
            hessian = torch.zeros(seen.shape[-1], seen.shape[-1], device=device)
            for _ in inputs:
                authors_way.add_to_hessian(hessian, seen, len(inputs))
            authors_way.factor(hessian)

    return {
        "floor block": timed(device, lambda: (block.outputs(inputs, 1), block.outputs(inputs, 1))),
        "ours block": timed(device, lambda: prune(block, inputs, SparseGPT())),
        "authors block": timed(device, lambda: authors_way.sparsegpt_block(block, inputs)),
        "ours factors": timed(device, hessians_and_factors),
        "authors factors": timed(device, authors_hessians_and_factors),
    }


def cell(case: Case, what: str, rounds: list[dict[str, float]], suffix: str = "", peak: int | None = None) -> Cell:
    ours, floor, authors = (
        [found[name + suffix] for found in rounds if name + suffix in found] for name in ("ours", "floor", "authors")
    )

    def ratio(of: list[float], to: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(of, to, strict=True))

    return Cell(
        case.name,
        what,
        statistics.median(ours),
        statistics.median(floor) if floor else None,
        ratio(ours, floor) if floor else None,
        statistics.median(authors) if authors else None,
        ratio(authors, ours) if authors else None,
        peak,
    )


def run_case(case: Case, device: torch.device, dtype: torch.dtype, rounds: int) -> list[Cell]:
    block, inputs = make_block(case, device, dtype)
    block(inputs[:1])  # the first call of a shape is slower
    besa = [besa_round(block, inputs) for _ in range(rounds)]
    cells = [
        cell(case, "BESA step", besa, " step"),
        cell(case, "BESA block", besa, " block", peak_bytes(device, block, inputs)),
    ]
    cells.append(cell(case, "Wanda block", [wanda_round(block, inputs) for _ in range(rounds)]))
    sparsegpt = [sparsegpt_round(block, inputs) for _ in range(rounds)]
    cells += [cell(case, "SparseGPT block", sparsegpt, " block")]
    return [*cells, cell(case, "SparseGPT Hessians and factors", sparsegpt, " factors")]


def peak_bytes(device: torch.device, block: Block, inputs: Tensor) -> int | None:
    """Most device memory that BESA held on this block, inputs and targets included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    prune(block, inputs, Besa())
    return torch.cuda.max_memory_allocated(device)


def show(cells: list[Cell]) -> str:
    lines = ["| case | what | this, s | floor, s | ratio | authors' way, s | authors' / this |", "|---" * 7 + "|"]
    for line in cells:
        authors = f"{line.authors:.3f} | {line.authors_ratio:.2f}" if line.authors else "- | -"
        floor = f"{line.floor:.3f} | {line.ratio:.2f}" if line.floor else "- | -"
        lines.append(f"| {line.case} | {line.what} | {line.seconds:.3f} | {floor} | {authors} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="run only the cases whose name holds this")
    parser.add_argument("--out", type=Path, help="default: blocks_cpu.json or blocks_cuda.json beside this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    cells: list[Cell] = []
    for case in CUDA if cuda else CPU:
        if arguments.only in case.name:
            cells += run_case(case, device, torch.bfloat16 if cuda else torch.float32, arguments.rounds)
            print(show(cells[-5:]), flush=True)
    record = {
        "machine": describe_machine(device),
        "rounds": arguments.rounds,
        "cells": [asdict(line) for line in cells],
    }
    out = arguments.out or HERE / f"blocks_{device.type}.json"
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(show(cells))


if __name__ == "__main__":
    main()
