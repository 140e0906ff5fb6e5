"""What a step of recovery costs beside plain PyTorch's own masked step, and the memory that each holds.

    python experiments/benchmarks/recovery.py [--rounds 5]

The plain step: dense AdamW (fused), its gradient's norm clipped, every pruned weight multiplied by its mask's 0 after
it. Llamas of two random blocks, half of each linear's weights zero, next-token loss on random tokens. A round is one
step of each, one after the other, in an order that turns; seconds are processor time of one thread, a cell is the
median over rounds, a ratio the median of the rounds' ratios. Memory: in a process of its own, what the peak of two
steps on few tokens adds to a process that has taken a small step before, the model among it, in bytes a parameter.
Needs torch, transformers, safetensors, jaxtyping and psutil alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from machine import describe_machine
from real_block import peak
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from besa_exp.display.markdown import markdown_table
from besa_exp.recovery.full import Full
from besa_exp.recovery.keep_bits import keep_of_zeros, parameters_of_linears
from besa_exp.recovery.lora import Lora
from besa_exp.recovery.objective import NextToken
from besa_exp.tensors.keep_bits import KeepBits

HERE = Path(__file__).parent
VOCABULARY = 1024
METHODS = ("plain", "full", "lora")


@dataclass(frozen=True)
class Case:
    """The sizes of the blocks, and the windows of a step."""

    name: str
    hidden: int
    ffn: int
    heads: int
    windows: int
    seq_len: int
    blocks: int = 2


CASES = (
    Case("768 / 2048, 8 x 256 tokens", 768, 2048, 12, 8, 256),
    Case("2048 / 5632, 4 x 512 tokens", 2048, 5632, 16, 4, 512, blocks=1),
)

TINY = Case("tiny", 64, 96, 4, 2, 32)
FEW = 64  # tokens of a step whose memory is measured: activations are next to nothing


def pruned_model(case: Case) -> tuple[LlamaForCausalLM, dict[str, KeepBits]]:
    """A random Llama, half of whose weights in the blocks' linears are 0, and what is kept."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.hidden,
        intermediate_size=case.ffn,
        num_hidden_layers=case.blocks,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        max_position_embeddings=case.seq_len,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in parameters_of_linears(model).values():
        parameter.mul_(torch.rand(parameter.shape) < 0.5)
    return model, keep_of_zeros(model)


def windows_of(case: Case, number: int) -> Tensor:
    """The tokens of a step."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, VOCABULARY, (case.windows, case.seq_len), generator=generator)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """The next token's, as a plain training loop has it."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, windows[:, 1:].flatten())


def plain(model: nn.Module, keep: dict[str, KeepBits]) -> Callable[[Tensor, int], float]:
    """A step of the plain way."""
    masks = {name: bits.mask().float() for name, bits in keep.items()}
    parameters = [*model.requires_grad_().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def step(windows: Tensor, number: int) -> float:
        loss = loss_of(model, windows)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask)
        return float(loss.detach())

    return step


def step_of(method: str, case: Case) -> Callable[[Tensor, int], float]:
    """A step of a method on a model of its own."""
    model, keep = pruned_model(case)
    if method == "plain":
        return plain(model, keep)
    tuner = {"full": Full(), "lora": Lora()}[method].begin(model, keep, 0)
    objective = NextToken(model, micro_batch=case.windows)
    return lambda windows, number: tuner.step(objective, windows, number, 1.0).loss


def seconds_of(case: Case, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each method's steps; a first round is not counted."""
    steps = {method: step_of(method, case) for method in METHODS}
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(rounds + 1):
        turn = number % len(METHODS)
        for method in [*METHODS[turn:], *METHODS[:turn]]:
            windows = windows_of(case, number)
            began = time.process_time()
            steps[method](windows, number)
            if number:
                found[method].append(time.process_time() - began)
    return found


def held_bytes(method: str, case: Case) -> float:
    """In this process: what the peak of two steps on few tokens adds, a parameter, the model's weights among it."""
    few = replace(case, windows=1, seq_len=FEW)
    warm = step_of(method, TINY)  # what the libraries take once
    warm(windows_of(TINY, 0), 0)
    before = psutil.Process().memory_info().rss
    step = step_of(method, few)
    for number in range(2):
        step(windows_of(few, number), number)
    model, _ = pruned_model(few)
    return (peak() - before) / sum(parameter.numel() for parameter in model.parameters())


def row_of(case: Case, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and medians of the rounds' ratios to the plain step."""
    ratios = {
        method: [own / plain for own, plain in zip(seconds[method], seconds["plain"], strict=True)]
        for method in METHODS
    }
    return {
        "case": asdict(case),
        "seconds": {method: median(found) for method, found in seconds.items()},
        "ratio": {method: median(found) for method, found in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=METHODS, help="measure the memory of one in this process, and print it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.only:
        print(held_bytes(given.only, CASES[-1]))
        return
    held = {}  # first, while this process is small: a child's peak begins with what its parent holds
    for method in METHODS:
        command = [sys.executable, __file__, "--only", method]
        held[method] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = [row_of(case, seconds_of(case, given.rounds)) for case in CASES]
    for row in rows:
        seconds, ratio = row["seconds"], row["ratio"]
        cells = [[method, f"{seconds[method]:.3f}", f"{ratio[method]:.2f}"] for method in METHODS]
        print(row["case"]["name"], *markdown_table(["step", "processor seconds", "to plain"], cells), sep="\n")
    print(
        *markdown_table(["step", "bytes a parameter"], [[name, f"{size:.1f}"] for name, size in held.items()]), sep="\n"
    )
    record = {"machine": describe_machine(torch.device("cpu")), "rounds": given.rounds, "cases": rows, "held": held}
    (HERE / "recovery.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
