"""Benchmarks of one block: each method against its floor and the authors' way, in the same run.

    python experiments/benchmarks/blocks.py                 # CPU shapes; --device cuda: Llama-2-7B and 70B shapes

A floor is what no implementation of the method can avoid: passes of the same block, dense, over the same samples. Each
round runs everything once, one after the other; a cell is the median over rounds, a ratio the median of the rounds'
ratios. A step of BESA is followed by a bare one each time, so that both meet the same machine. A floor's products are
computed by the routine that this project chooses (`besa_exp.blocks.products`), those of the authors' way by PyTorch's
own. That way runs twice: with the attention of the others, and with that of the transformers it needs (4.31), which
forms the matrix of scores ("eager"). Weights and inputs are random, those of the embedded model apart. Needs torch,
transformers, jaxtyping and prodigyopt alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import authors_way
import torch
from machine import describe_machine
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import besa_exp
from besa_exp.blocks.block import Block, capture_blocks, embed
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.pruner import Pruner
from besa_exp.blocks.reports import Step
from besa_exp.display.markdown import markdown_table
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.tensors.hessian import upper_factor
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.statistics import Hessian

HERE = Path(__file__).parent
MODEL_DIR = Path(besa_exp.__file__).parent / "texts" / "embedded" / "model"


@dataclass(frozen=True)
class Case:
    """A Llama block's sizes, the calibration samples it is given, and how many such blocks there are. With `experts` it
    is Qwen3's mixture: `ffn` is the size of one expert, and a token goes to `chosen` of them.

    Of many blocks one lies on the device at a time, and is filled from host memory, as a streamed model is."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    samples: int
    seq_len: int
    blocks: int = 1
    experts: int = 0
    chosen: int = 0
    head_dim: int = 0  # 0: hidden / heads


CPU = (
    Case("768 / 2048, 512 tokens", 768, 2048, 12, 12, 32, 512),
    Case("768 / 2048, 2048 tokens", 768, 2048, 12, 12, 8, 2048),
    Case("2048 / 5632, 512 tokens", 2048, 5632, 16, 16, 8, 512),
    Case("2048 / 5632, 2048 tokens", 2048, 5632, 16, 16, 4, 2048),
    Case("Qwen3-30B-A3B block, 16 of its 128 experts", 2048, 768, 32, 4, 8, 512, experts=16, chosen=2, head_dim=128),
)
CUDA = (
    Case("Llama-2-7B block", 4096, 11008, 32, 32, 128, 2048),
    Case("Llama-2-70B block", 8192, 28672, 64, 8, 128, 2048),
    Case("Qwen3-30B-A3B block", 2048, 768, 32, 4, 128, 2048, experts=128, chosen=8, head_dim=128),
    Case("Llama-2-7B, 32 blocks", 4096, 11008, 32, 32, 128, 2048, blocks=32),
)
EMBEDDED = "embedded model, 64 x 256 tokens"


@dataclass(frozen=True)
class Cell:
    """One line: seconds of this project, of the floor, of the authors' way, that with eager attention, and ratios."""

    case: str
    what: str
    seconds: float
    floor: float | None
    ratio: float | None
    authors: float | None = None
    authors_ratio: float | None = None
    authors_eager: float | None = None
    authors_eager_ratio: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Work:
    """Blocks to prune, one after the other, `times` over, and what enters the first. `dense`: their weights, on the
    host, which are put into a block when its turn comes."""

    blocks: tuple[Block, ...]
    inputs: Tensor
    dense: tuple[dict[str, Tensor], ...]
    times: int = 1

    @staticmethod
    def of(blocks: list[Block], inputs: Tensor, times: int = 1) -> Work:
        dense = [{name: W.weight.detach().cpu().clone() for name, W in block.linears.items()} for block in blocks]
        return Work(tuple(blocks), inputs, tuple(dense), times)

    def __iter__(self) -> Iterator[Block]:
        for block, dense in zip(self.blocks * self.times, self.dense * self.times, strict=True):
            for name, linear in block.linears.items():
                linear.weight.detach().copy_(dense[name])
            yield block


def make_work(case: Case, device: torch.device, dtype: torch.dtype, attention: str = "sdpa") -> Work:
    """A block with random weights on `device`, and random inputs for it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": case.hidden,
        "intermediate_size": case.ffn,
        "num_hidden_layers": 1,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "head_dim": case.head_dim or case.hidden // case.heads,
        "max_position_embeddings": case.seq_len,
        "attn_implementation": attention,
    }
    experts: dict[str, Any] = {
        "moe_intermediate_size": case.ffn,
        "num_experts": case.experts,
        "num_experts_per_tok": case.chosen,
    }
    with device:
        model = (
            Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts))
            if case.experts
            else LlamaForCausalLM(LlamaConfig(**sizes))
        )
    nn.Module.to(model, dtype).eval().requires_grad_(False)
    block = capture_blocks(model, torch.zeros(case.samples, case.seq_len, dtype=torch.long))[0]
    inputs = torch.randn(case.samples, case.seq_len, case.hidden, device=device, dtype=dtype)
    inputs *= torch.rand(case.hidden, device=device, dtype=dtype)  # channels of unequal size, as in life
    return Work.of([block], inputs, case.blocks)


def embedded_work(device: torch.device, attention: str = "sdpa", samples: int = 64, seq_len: int = 256) -> Work:
    """The model of the package, on random tokens."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32, attn_implementation=attention)
    nn.Module.to(model, device).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (samples, seq_len), generator=generator)
    blocks = capture_blocks(model, tokens)
    return Work.of(blocks, embed(model, blocks, tokens, samples))


class StockLinear(torch.nn.Linear):
    """A linear that this project does not compute by a routine of its choice, as it is of another class."""


def stock(work: Work) -> Work:
    """`work` with PyTorch's own products, from now on."""
    for linear in (linear for block in work.blocks for linear in block.linears.values()):
        linear.module.__class__ = StockLinear
    return work


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, act: Callable[[], object]) -> float:
    started = clock(device)
    act()
    return clock(device) - started


def prune(work: Work, pruner: Pruner, on_step: Callable[[Step], None] = lambda step: None) -> None:
    """The block loop."""
    for _ in prune_blocks(work, work.inputs.clone(), pruner, Goal(0.5), 1, on_step):
        pass


def bare_step(block: Block, sample: Tensor) -> None:
    """Forward and backward of the dense block: gradients to its weights and inside it, none to its input."""
    weights = {name: linear.weight.detach().requires_grad_() for name, linear in block.linears.items()}
    torch.autograd.grad(block(sample, weights), list(weights.values()), torch.ones_like(sample))


def besa_floor(work: Work) -> None:
    """Statistics and targets, one epoch of bare steps, outputs."""
    inputs = work.inputs
    for block in work:
        block.outputs(inputs, 1)
        for sample in inputs.split(1):
            bare_step(block, sample)
        inputs = block.outputs(inputs, 1)


def two_passes(work: Work) -> None:
    """Statistics, outputs."""
    inputs = work.inputs
    for block in work:
        block.outputs(inputs, 1)
        inputs = block.outputs(inputs, 1)


def authors(work: Work, prune_block: Callable[[Block, Tensor], object]) -> None:
    """The authors' way for each block."""
    inputs = work.inputs
    for block in work:
        prune_block(block, inputs)
        inputs = block.outputs(inputs, 1) if len(work.blocks) > 1 else inputs


def step_round(work: Work, theirs: dict[str, Work], samples: int = 16) -> dict[str, float]:
    """The usual step of BESA, each followed by a bare one, and of the authors' way, on each of `theirs`."""
    device, block = work.inputs.device, work.blocks[0]
    times = -(-8 // len(work.inputs))  # enough steps that the median is none of those which judge by the probe
    few = replace(work, inputs=work.inputs.repeat(times, 1, 1)[:samples])
    ours, floor = [], []
    began = clock(device)

    def on_step(step: Step) -> None:
        nonlocal began
        ours.append(clock(device) - began)
        floor.append(timed(device, lambda: bare_step(block, work.inputs[:1])))
        began = clock(device)

    prune(few, Besa(), on_step)
    found = {"ours": ours, "floor": floor}
    for name, each in theirs.items():
        moments = authors_way.learn_block(each.blocks[0], few.inputs)
        found[name] = [later - sooner for sooner, later in itertools.pairwise(moments)]
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def method_round(
    work: Work,
    theirs: dict[str, Work],
    pruner: Pruner,
    floor: Callable[[Work], None],
    their_way: Callable[[Block, Tensor], object] | None,
) -> dict[str, float]:
    device = work.inputs.device
    seconds = {
        "floor": timed(device, lambda: floor(work)),
        "ours": timed(device, lambda: prune(work, pruner)),
    }
    if their_way:
        seconds |= {name: timed(device, partial(authors, each, their_way)) for name, each in theirs.items()}
    return seconds


def factor_round(work: Work) -> dict[str, float]:
    """Hessians and factors once for each shared input, and once for each linear."""
    device, block, inputs = work.inputs.device, work.blocks[0], work.inputs
    features: dict[str, Tensor] = {}
    authors_way.statistics(block, inputs[:1], lambda name, seen: features.update({name: seen}))
    distinct = {id(seen): seen for seen in features.values()}.values()

    def ours() -> None:
        for seen in distinct:
            hessian = Hessian(seen.shape[-1], device)
            for _ in inputs:
                hessian.add(seen)
            hessian.sum_over_ranks(len(inputs))
            upper_factor(hessian.matrix, 0.01, "benchmark")

    def theirs() -> None:
        for seen in features.values():
            hessian = torch.zeros(seen.shape[-1], seen.shape[-1], device=device)
            for _ in inputs:
                authors_way.add_to_hessian(hessian, seen, len(inputs))
            authors_way.factor(hessian)

    return {"ours": timed(device, ours), "authors": timed(device, theirs)}


def cell(case: str, what: str, rounds: list[dict[str, float]], peak: int | None = None) -> Cell:
    def median(name: str) -> float | None:
        return statistics.median(found[name] for found in rounds) if name in rounds[0] else None

    def ratio(of: str, to: str) -> float | None:
        there = of in rounds[0] and to in rounds[0]
        return statistics.median(found[of] / found[to] for found in rounds) if there else None

    return Cell(
        case,
        what,
        statistics.median(found["ours"] for found in rounds),
        median("floor"),
        ratio("ours", "floor"),
        median("authors"),
        ratio("authors", "ours"),
        median("authors_eager"),
        ratio("authors_eager", "ours"),
        peak,
    )


def run_case(name: str, make: Callable[..., Work], rounds: int) -> list[Cell]:
    """A line for each method, and of a single block what it is made of."""
    work = make()
    peak = peak_bytes(work)  # before there is anything else on the device
    mixture = any(linear.of_mixture for linear in work.blocks[0].linears.values())  # the authors' code knows none
    theirs = {} if mixture else {"authors": stock(make()), "authors_eager": stock(make(attention="eager"))}
    for each in (work, *theirs.values()):
        next(iter(each))(each.inputs[:1])  # the first call of a shape is slower

    def several(measure: Callable[[], dict[str, float]]) -> list[dict[str, float]]:
        return [measure() for _ in range(rounds)]

    single, whole = len(work.blocks) * work.times == 1, work.times > 1
    their_besa = None if whole else authors_way.learn_block  # hours for a whole model of random weights; blocks tell it
    their_sparsegpt = None if whole else authors_way.sparsegpt_block
    cells = [cell(name, "BESA step", several(lambda: step_round(work, theirs)))] if single else []
    besa = several(lambda: method_round(work, theirs, Besa(), besa_floor, their_besa))
    cells.append(cell(name, "BESA", besa, peak))
    cells.append(cell(name, "Wanda", several(lambda: method_round(work, theirs, Uniform(), two_passes, None))))
    sparsegpt = several(lambda: method_round(work, theirs, SparseGPT(), two_passes, their_sparsegpt))
    cells.append(cell(name, "SparseGPT", sparsegpt))
    if single and not mixture:
        cells.append(cell(name, "SparseGPT's Hessians and factors", several(lambda: factor_round(work))))
    return cells


def run_in_bf16(name: str, make: Callable[..., Work], rounds: int) -> list[Cell]:
    """The same weights and inputs with products in bf16, against fp32 in the place of a floor."""
    work = make()
    rounded = replace(work, blocks=tuple(replace(block, compute_dtype=torch.bfloat16) for block in work.blocks))
    prune(rounded, Uniform())  # the first call of a shape is slower
    found = []
    for what, pruner in (("BESA", Besa()), ("Wanda", Uniform()), ("SparseGPT", SparseGPT())):
        seconds = [
            [timed(work.inputs.device, partial(prune, each, pruner)) for each in (rounded, work)] for _ in range(rounds)
        ]
        found.append(cell(name, f"{what} in bf16", [{"ours": ours, "floor": floor} for ours, floor in seconds]))
    return found


def peak_bytes(work: Work) -> int | None:
    """Most device memory that BESA held, inputs and targets included; None on a CPU."""
    device = work.inputs.device
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    prune(work, Besa())
    return torch.cuda.max_memory_allocated(device)


def show(cells: list[Cell]) -> str:
    def shown(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    rows = [
        [
            line.case,
            line.what,
            shown(line.seconds, 3),
            shown(line.floor, 3),
            shown(line.ratio, 2),
            shown(line.authors, 3),
            shown(line.authors_ratio, 2),
            shown(line.authors_eager, 3),
            shown(line.authors_eager_ratio, 2),
        ]
        for line in cells
    ]
    head = ["case", "what", "this, s", "floor, s", "ratio", "authors' way, s", "/ this", "eager, s", "/ this"]
    return "\n".join(markdown_table(head, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="run only the cases whose name holds this")
    parser.add_argument("--bf16", action="store_true", help="products in bf16 against fp32, instead of all else")
    parser.add_argument("--out", type=Path, help="default: blocks_cpu.json or blocks_cuda.json beside this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    makers = {case.name: partial(make_work, case, device, dtype) for case in (CUDA if cuda else CPU)}
    makers |= {} if cuda else {EMBEDDED: partial(embedded_work, device)}
    out = arguments.out or HERE / f"blocks_{device.type}{'_bf16' if arguments.bf16 else ''}.json"
    run = run_in_bf16 if arguments.bf16 else run_case
    cells: list[Cell] = []
    for name, make in makers.items():
        if arguments.only in name:
            cells += run(name, make, arguments.rounds)
            print(show(cells), flush=True)
            record = {"machine": describe_machine(device), "rounds": arguments.rounds, "cells": [*map(asdict, cells)]}
            out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
