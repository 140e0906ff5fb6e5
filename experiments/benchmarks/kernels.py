"""Benchmarks of the kernels: each against its plain-PyTorch reference and the floor of the memory, in the same run.

    python experiments/benchmarks/kernels.py --device cuda           # Llama-2-7B and 70B linears, bf16
    python experiments/benchmarks/kernels.py --small                 # on a CPU: does it run? the references only
    TRITON_INTERPRET=1 python experiments/benchmarks/kernels.py --small   # the kernels too, in the interpreter, untimed

The floor is the bytes that must move at the bandwidth of a large copy measured at the start. Kernel and reference take
turns; a cell is the median over rounds. What was not measured says so. Needs torch, jaxtyping and, for the kernels,
Triton.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from besa_exp.display.markdown import markdown_table
from besa_exp.tensors.kernels import HAS_TRITON

HERE = Path(__file__).parent
LLAMA = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672)]  # out, in
SMALL = [(16, 128), (9, 63)]
WINDOW = 0.1  # of a row: BESA's default
GROUP = 128  # columns that SparseGPT updates in one step
CANDIDATES = 101  # of the paper: sparsities 0, 0.01, ... 1
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Cell:
    """One line, times in milliseconds; None: not measured."""

    kernel: str
    shape: tuple[int, int]
    floor: float
    triton: float | None = None
    reference: float | None = None


@dataclass(frozen=True)
class Case:
    """One call: its arguments, and the bytes that no implementation can avoid reading or writing."""

    kernel: str
    arguments: tuple[object, ...]
    bytes_moved: float


def cases(rows: int, columns: int, device: torch.device) -> Iterator[Case]:
    """Random weights in bf16, importances in fp32, ranks in int16."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(rows, columns, device=device, generator=generator).bfloat16()
    gradient = torch.randn(rows, columns, device=device, generator=generator).bfloat16()
    importance = torch.rand(rows, columns, device=device, generator=generator)
    yield Case("rank_in_row", (importance,), weight.numel() * (4 + 2))
    for kept, group in ((2, 4), (4, 8)):
        if columns % group == 0:
            yield Case(f"rank_in_row, {kept}:{group}", (importance.view(-1, group),), weight.numel() * (4 + 2))
    rank = importance.argsort(dim=1).to(torch.int16)  # any permutation will do
    del importance
    pruned = torch.full((rows,), columns // 2, device=device)
    yield Case("masked_weight", (weight, rank, pruned), weight.numel() * (2 + 2 + 2))
    near = 2 + WINDOW * (2 + 2)  # all ranks; weights and gradients in the window
    yield Case("count_gradient", (weight, gradient, rank, pruned, WINDOW * columns), weight.numel() * near)
    cuts = torch.tensor([columns * d // (CANDIDATES - 1) for d in range(CANDIDATES)], device=device)
    moved = weight.numel() * (2 + 2 + 2) + rows * CANDIDATES * 4
    yield Case("candidate_gradient", (weight, gradient, rank, cuts), moved)
    group = min(GROUP, columns)
    factor = torch.eye(columns, device=device).add_(0.01).triu_()[:group, :group]
    keep_mask = rank[:, :group] >= columns // 2
    moved = rows * group * (4 + 1 + 4 + 4)
    yield Case(f"obs_columns, {group} columns", (weight.float()[:, :group], factor, keep_mask), moved)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_bandwidth(device: torch.device, size: int, rounds: int) -> float:
    """Bytes a second, read and written together, of a copy of `size` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source), device) for _ in range(rounds + 2)][2:]
    return 2 * size / (statistics.median(times) / 1000)


def implementation(operation: str, suffix: str, arguments: tuple[object, ...]) -> Callable[[], object]:
    """The call of `operation` in its reference or its kernel's module, whatever the device."""
    function = getattr(importlib.import_module(f"besa_exp.tensors.kernels.{operation}{suffix}"), operation)
    return lambda: function(*arguments)


def measure(case: Case, shape: tuple[int, int], device: torch.device, bandwidth: float, rounds: int) -> Cell:
    """Median times, after two rounds to compile and warm up. What runs out of memory is not measured."""
    operation = case.kernel.split(",")[0]
    calls = {"reference": implementation(operation, "", case.arguments)}
    if HAS_TRITON and device.type == "cuda":
        calls["triton"] = implementation(operation, "_triton", case.arguments)
    elif HAS_TRITON and INTERPRETED:
        implementation(operation, "_triton", case.arguments)()  # it runs; the interpreter's time says nothing
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in list(calls.items()):
            try:
                times[name].append(timed(call, device))
            except torch.cuda.OutOfMemoryError:
                del calls[name]
                times[name].clear()
    medians = {name: statistics.median(found[2:]) for name, found in times.items() if len(found) > 2}
    return Cell(case.kernel, shape, 1000 * case.bytes_moved / bandwidth, **medians)


def describe(device: torch.device) -> dict[str, object]:
    """Chip and versions, for the record beside the figures."""
    return {
        "chip": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.import_module("triton").__version__ if HAS_TRITON else None,
    }


def show(cells: list[Cell]) -> str:
    """The table: times, and how many times the floor the kernel and the kernel's time the reference take."""

    def figure(value: float | None, to: float | None = 1.0) -> str:
        return "not measured" if value is None or to is None else f"{value / to:.3g}"

    head = ["kernel", "out x in", "Triton, ms", "floor, ms", "/ floor", "PyTorch, ms", "PyTorch / Triton"]
    rows = []
    for cell in cells:
        triton = [figure(cell.triton), figure(cell.floor), figure(cell.triton, cell.floor)]
        reference = [figure(cell.reference), figure(cell.reference, cell.triton)]
        rows.append([cell.kernel, f"{cell.shape[0]} x {cell.shape[1]}", *triton, *reference])
    return "\n".join(markdown_table(head, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--out", type=Path, help="default: kernels_cpu.json or kernels_cuda.json beside this file; none if small"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    bandwidth = copy_bandwidth(device, 1 << (20 if arguments.small else 30), arguments.rounds)
    cells = [
        measure(case, (rows, columns), device, bandwidth, arguments.rounds)
        for rows, columns in (SMALL if arguments.small else LLAMA)
        for case in cases(rows, columns, device)
    ]
    print(f"copy: {bandwidth / 1e9:.0f} GB/s\n{show(cells)}")
    figures = [
        {key: "not measured" if value is None else value for key, value in asdict(cell).items()} for cell in cells
    ]
    record = {**describe(device), "copy_bytes_per_second": bandwidth, "milliseconds": figures}
    out = arguments.out or (None if arguments.small else HERE / f"kernels_{device.type}.json")
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
