"""Benchmark of perplexity: tokens a second against the model's own forward pass at its best batch size.

    python experiments/benchmarks/evaluation.py        # CPU shapes; --device cuda: Llama 2 7B and Llama 3 8B shapes

The floor is `model(input_ids)` without a cache, its logits thrown away, at the batch size that is fastest for it (every
power of two is tried once). Then each round runs the floor and the evaluator with its automatic batch size, one after
the other; the ratio is the median of the rounds' ratios. Weights and tokens are random but for the embedded model.
Needs torch, transformers, safetensors and jaxtyping alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from machine import describe_machine
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from besa_exp.display.markdown import markdown_table
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.texts.embedded.text import MODEL_DIR

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """A Llama's sizes and the windows that it scores; `hidden` None: the embedded model."""

    name: str
    windows: int
    seq_len: int
    vocabulary: int = 2048
    hidden: int | None = None
    ffn: int = 0
    heads: int = 0
    kv_heads: int = 0
    blocks: int = 0


CPU = (
    Case("embedded, 2.4 M", 16, 512),
    Case("768 / 2048 x 4, vocabulary 32,000", 4, 512, 32_000, 768, 2048, 12, 12, 4),
    Case("768 / 2048 x 4, vocabulary 128,256", 2, 1024, 128_256, 768, 2048, 12, 12, 4),
)
CUDA = (
    Case("embedded, 2.4 M", 1024, 512),
    Case("Llama 2 7B", 64, 2048, 32_000, 4096, 11008, 32, 32, 32),
    Case("Llama 3 8B", 64, 2048, 128_256, 4096, 14336, 32, 8, 32),
    Case("Llama 3 8B, 8,192 tokens", 16, 8192, 128_256, 4096, 14336, 32, 8, 32),
)


@dataclass(frozen=True)
class Cell:
    """Tokens a second of the floor at its best batch size and of the evaluator at its own, and their ratio."""

    case: str
    floor_batch_size: int
    floor: float
    batch_size: int
    evaluator: float
    ratio: float
    peak_bytes: int | None


def model_of(case: Case, device: torch.device) -> nn.Module:
    """fp32 on a CPU, bf16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if case.hidden is None:
        return nn.Module.to(AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=dtype), device).eval()
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.ffn,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        num_hidden_layers=case.blocks,
        max_position_embeddings=case.seq_len,
    )
    with torch.device(device):
        return nn.Module.to(LlamaForCausalLM(config), dtype).eval()


@torch.no_grad()
def forward(model: nn.Module, windows: Tensor, batch_size: int) -> None:
    """The floor: every window through the model."""
    for batch in windows.split(batch_size):
        model(input_ids=batch, use_cache=False)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall clock, the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def best_batch_size(model: nn.Module, windows: Tensor, tries: int) -> int:
    """The floor's: the fastest power of two that fits, each by the best of its tries."""
    device, fastest = windows.device, (float("inf"), 1)
    for batch_size in powers_of_two(len(windows)):
        try:
            taken = min(seconds(lambda size=batch_size: forward(model, windows, size), device) for _ in range(tries))
        except torch.OutOfMemoryError:
            break
        fastest = min(fastest, (taken, batch_size))
    return fastest[1]


def powers_of_two(limit: int) -> Iterator[int]:
    """1, 2, 4, ... up to `limit`."""
    return (2**power for power in range(limit.bit_length()))


def measure(case: Case, device: torch.device, rounds: int) -> Cell:
    """One case, its model built and dropped."""
    torch.manual_seed(0)
    model = model_of(case, device)
    windows = torch.randint(case.vocabulary, (case.windows, case.seq_len), device=device)
    forward(model, windows[:2], 1)
    perplexity(model, windows[:2], case.seq_len, "auto")
    floor_size = best_batch_size(model, windows, tries=2)
    times: list[tuple[float, float]] = []
    size = 0
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        floor = seconds(lambda: forward(model, windows, floor_size), device)
        began = time.perf_counter()
        size = perplexity(model, windows, case.seq_len, "auto").batch_size  # its value is read: it has finished
        times.append((floor, time.perf_counter() - began))
    floors, ours = zip(*times, strict=True)
    return Cell(
        case=case.name,
        floor_batch_size=floor_size,
        floor=windows.numel() / statistics.median(floors),
        batch_size=size,
        evaluator=windows.numel() / statistics.median(ours),
        ratio=statistics.median(floor / our for floor, our in times),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def table(cells: list[Cell]) -> str:
    """Markdown."""
    head = ["model", "floor: batch", "tokens/s", "evaluator: batch", "tokens/s", "evaluator / floor"]
    rows = []
    for cell in cells:
        floor = [str(cell.floor_batch_size), f"{cell.floor:,.0f}"]
        evaluator = [str(cell.batch_size), f"{cell.evaluator:,.0f}"]
        rows.append([cell.case, *floor, *evaluator, f"{cell.ratio:.3f}"])
    return "\n".join(markdown_table(head, rows))


def main() -> None:
    """Prints the table and writes evaluation.json, or evaluation_cuda.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of a CPU; default: torch's")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the JSON file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    cells = [measure(case, device, arguments.rounds) for case in (CUDA if device.type == "cuda" else CPU)]
    print(table(cells))
    name = "evaluation_cuda.json" if device.type == "cuda" else "evaluation.json"
    record = {
        "machine": describe_machine(device),
        "rounds": arguments.rounds,
        "cells": [asdict(cell) for cell in cells],
    }
    (arguments.out / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
