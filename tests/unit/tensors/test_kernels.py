"""Each kernel against its reference and against fp64: in Triton's interpreter, compiled, and on a CUDA device.

The interpreter must be chosen before Triton is imported, which other tests' libraries do: these tests run in a process
of their own, started by one test here. All memory that a kernel does not fill shows: `torch.empty` gives NaN."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch

from besa_exp.tensors import kernels

HAS_TRITON = importlib.util.find_spec("triton") is not None
TOO_OLD = HAS_TRITON and tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 7)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (HAS_TRITON and torch.cuda.is_available()), reason="needs Triton and a CUDA device"),
]


def on_devices(names, interpreted, gpu):
    """A table for the interpreter, where it runs, and one for the chip."""
    rows = [("cpu", *row) for row in interpreted] if INTERPRETED else []
    shown = 0 if INTERPRETED else None if torch.cuda.is_available() else 1  # one skip a test says it
    rows += [pytest.param("cuda", *row, marks=ON_GPU) for row in gpu[:shown]]
    return pytest.mark.parametrize(f"device, {names}", rows)


SMALL = [(1, 1), (5, 63), (5, 127)]
WIDE = [(3, 1000), (1, 11008), (1, 28672)]
MIXED = [*itertools.product(SMALL, DTYPES), *zip(WIDE, DTYPES, strict=True)]
EVERY = list(itertools.product([*SMALL, (1000, 1000), (63, 11008), (127, 28672), (28672, 63), (11008, 1)], DTYPES))
GROUPS = [(1, 1), (600, 4), (33, 63), (17, 128), (5, 256)]


@pytest.fixture(autouse=True)
def _poisoned_and_deterministic():
    """In this mode PyTorch fills what `torch.empty` gives: NaN, or the largest integer."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")  # `use_deterministic_algorithms` would import all of torch._inductor
    yield
    torch.set_deterministic_debug_mode(before)


def in_triton(name, device, *arguments) -> Any:
    """What the kernel gives, on the CPU, for arguments put on `device` as they lie in memory; the same twice."""
    kernel = getattr(importlib.import_module(f"besa_exp.tensors.kernels.{name}_triton"), name)
    placed = [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments]
    result = kernel(*placed)
    results = result if isinstance(result, tuple) else (result,)
    if device != "cpu":
        again = kernel(*placed)
        assert all(map(torch.equal, results, again if isinstance(again, tuple) else (again,)))
    on_cpu = tuple(value.cpu() for value in results)
    return on_cpu if isinstance(result, tuple) else on_cpu[0]


def draw(shape, dtype, seed=0):
    """Weight and gradient (which lies in memory column by column), ranks with many ties, and all sorts of counts."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    gradient = torch.randn(columns, rows, generator=generator).to(dtype).T
    rank = kernels.rank_in_row((weight.abs() * 4).round())
    pruned = torch.tensor([0, 1, columns - 1, columns, columns // 2]).roll(columns)[torch.arange(rows) % 5]
    return weight, gradient, rank, pruned


def error_is_at_most_twice_the_references(result, reference, exact):
    """Largest errors over all outputs against fp64; the floor is one unit of rounding of the largest output."""
    assert result.shape == reference.shape
    assert result.dtype == reference.dtype
    floor = torch.finfo(torch.float32).eps * float(exact.abs().max())
    error, allowed = (float((value.double() - exact).abs().max()) for value in (result, reference))
    assert error <= 2 * allowed + floor


@on_devices("shape, dtype", [*MIXED, ((11008, 1), torch.bfloat16)], EVERY)
def test_masked_weight_is_the_weight_or_zero(device, shape, dtype):
    weight, _, rank, pruned = draw(shape, dtype)
    expected = torch.where(rank >= pruned[:, None], weight, torch.zeros_like(weight))
    for order in (rank, rank.int(), rank.T.contiguous().T):
        result = in_triton("masked_weight", device, weight, order, pruned)
        assert result.dtype == dtype
        assert torch.equal(result, expected)
    assert torch.equal(kernels.masked_weight(weight, rank, pruned), expected)
    assert torch.equal(kernels.masked_weight(weight, rank, pruned, out=torch.full_like(weight, 7.0)), expected)


@on_devices("shape", [((5, 63),)], [((5, 63),), ((1000, 1000),)])
def test_masked_weight_fills_the_given_tensor_and_nothing_beside_it(device, shape):
    weight, _, rank, pruned = (value.to(device) for value in draw(shape, torch.bfloat16))
    kernel = importlib.import_module("besa_exp.tensors.kernels.masked_weight_triton").masked_weight
    around = torch.full((2 * shape[0], shape[1] + 2), 7.0, dtype=torch.bfloat16, device=device)
    out, version = around[::2, 1:-1], around._version
    assert kernel(weight, rank, pruned, out=out) is out
    assert around._version > version  # autograd is told
    expected = around.clone().fill_(7.0)
    expected[::2, 1:-1] = kernels.masked_weight(weight, rank, pruned)
    assert torch.equal(around, expected)


@on_devices("shape, dtype", MIXED, EVERY)
@pytest.mark.parametrize("window", [0.5, 0.1])
def test_count_gradient_is_no_further_from_fp64_than_pytorch(device, shape, dtype, window):
    weight, gradient, rank, pruned = draw(shape, dtype)
    columns = shape[1]
    window = window if window == 0.5 else window * columns
    half = max(window / 2, 0.5)
    near = (rank >= (pruned - half)[:, None]) & (rank < (pruned + half)[:, None])
    total = torch.where(near, weight.double() * gradient.double(), 0).sum(dim=1)
    exact = -total / ((pruned + half).clamp(max=columns) - (pruned - half).clamp(min=0))
    result = in_triton("count_gradient", device, weight, gradient, rank, pruned, window)
    reference = kernels.count_gradient(weight, gradient, rank, pruned, window)
    error_is_at_most_twice_the_references(result, reference, exact)


def literal_candidate_gradient(weight, gradient, rank, cuts):
    product = weight.double() * gradient.double()
    return torch.stack([-(product * (rank < cut)).sum(dim=1) for cut in cuts.tolist()], dim=1)


@on_devices("shape, dtype", MIXED, [case for case in EVERY if case[0] != (127, 28672)])
def test_candidate_gradient_is_no_further_from_fp64_than_pytorch(device, shape, dtype):
    weight, gradient, rank, _ = draw(shape, dtype)
    cuts = torch.tensor([int(shape[1] * d / 100) for d in range(100, -1, -1)])
    result = in_triton("candidate_gradient", device, weight, gradient, rank, cuts)
    reference = kernels.candidate_gradient(weight, gradient, rank, cuts)
    error_is_at_most_twice_the_references(result, reference, literal_candidate_gradient(weight, gradient, rank, cuts))


@on_devices("candidates", [(1,), (300,)], [(1,), (2,), (300,)])
def test_candidates_may_come_in_any_number_and_order_and_repeat(device, candidates):
    weight, gradient, rank, _ = draw((3, 127), torch.float32)
    cuts = torch.randint(0, 128, (candidates,), generator=torch.Generator().manual_seed(0))
    result = in_triton("candidate_gradient", device, weight, gradient, rank.int(), cuts)
    exact = literal_candidate_gradient(weight, gradient, rank, cuts)
    error_is_at_most_twice_the_references(result, kernels.candidate_gradient(weight, gradient, rank, cuts), exact)


FEW = [(1, 1), (1000, 2), (63, 4), (5, 7), (3, 32), (2, 33), (3, 63), (2, 127)]
RANKED = [*itertools.product(FEW, DTYPES), *zip(WIDE, DTYPES, strict=True)]
RANKED_ON_GPU = [*RANKED, *EVERY, ((300, 64), torch.float32), ((2, 70000), torch.float32)]


@on_devices("shape, dtype", RANKED, RANKED_ON_GPU)
def test_ranks_sort_each_row_and_ties_go_by_position(device, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(shape, generator=generator).to(dtype)
    tied = (2 * spread).round() / 2  # 0 and -0 among them, which are equal
    for importance in (spread, tied) if shape[1] < 1000 or device != "cpu" else (tied,):
        importance[-1, 0] = torch.inf
        result = in_triton("rank_in_row", device, importance.T.contiguous().T)
        reference = kernels.rank_in_row(importance)
        assert result.dtype == reference.dtype
        assert torch.equal(result, reference)
        row = importance[0].tolist()
        order = sorted(range(len(row)), key=row.__getitem__)
        assert [int(result[0, j]) for j in order] == list(range(len(row)))


@on_devices("shape", [((1, 33000),)], [((2, 33000),), ((3, 65535),)])
def test_ranks_of_rows_too_wide_for_16_bits_are_int32(device, shape):
    importance = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    result = in_triton("rank_in_row", device, importance)
    assert result.dtype == torch.int32
    assert torch.equal(result, kernels.rank_in_row(importance))


def literal_obs_columns(weight, factor, keep_mask):
    weight, factor, errors = weight.double(), factor.double(), torch.zeros_like(weight, dtype=torch.float64)
    for j in range(weight.shape[1]):
        errors[:, j] = torch.where(keep_mask[:, j], 0, weight[:, j] / factor[j, j])
        weight = weight - errors[:, j, None] * factor[j] * (torch.arange(len(factor)) > j)
    return torch.where(keep_mask, weight, 0), errors


@on_devices("rows, group", [*GROUPS, (3, 300)], [*GROUPS, (3, 300), (28672, 128), (11008, 256), (1000, 127)])
def test_obs_columns_is_no_further_from_fp64_than_pytorch(device, rows, group):
    generator = torch.Generator().manual_seed(group)
    inputs = torch.randn(4 * group + 40, group + 9, generator=generator)
    whole = torch.linalg.cholesky(torch.linalg.inv(inputs.T @ inputs / len(inputs)), upper=True)
    factor = whole[5 : 5 + group, 5 : 5 + group]  # slices of a matrix, as SparseGPT has them
    weight = torch.randn(rows, group + 9, generator=generator)[:, 5 : 5 + group]
    keep_mask = (torch.rand(rows, group + 9, generator=generator) > 0.6)[:, 5 : 5 + group]
    results = in_triton("obs_columns", device, weight, factor, keep_mask)
    references = kernels.obs_columns(weight, factor, keep_mask)
    exact = literal_obs_columns(weight, factor, keep_mask)
    for result, reference, literal in zip(results, references, exact, strict=True):
        error_is_at_most_twice_the_references(result, reference, literal)
    assert not results[0][~keep_mask].any()
    assert not results[1][keep_mask].any()


@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(TOO_OLD, reason="the interpreter of Triton below 3.7 fails with numpy 2.4")
def test_kernels_agree_with_references_and_fp64_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def compile_only(self, *arguments, grid, warmup, num_warps=4, **constants):
    """In place of a launch: compile for an H100 or H200, the arguments specialised as at a launch."""
    from triton import compile as compile_kernel  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    constants = dict(constants)
    signature, aligned = {}, {}
    for i, (name, value) in enumerate(zip(self.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif isinstance(value, int) and value == 1:
            constants[name] = 1
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if (value.data_ptr() if isinstance(value, torch.Tensor) else value) % 16 == 0:
            aligned[(i,)] = [["tt.divisibility", 16]]
    signature = {name: signature.get(name, "constexpr") for name in self.arg_names}
    fixed = {(self.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(self, signature, fixed, aligned)
    compiled = compile_kernel(source, GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    assert len(compiled.asm["cubin"]) > 0
    return compiled.asm["ptx"]


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="needs Triton's compiler")
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(48, 4096, torch.bfloat16), (63, 127, torch.float16), (1, 1, torch.float32)],
)
def test_kernels_compile_to_machine_code_without_a_device(rows, columns, dtype, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", compile_only)
    weight, gradient, rank, pruned = draw((rows, columns), dtype)
    in_triton("masked_weight", "cpu", weight, rank, pruned)
    in_triton("count_gradient", "cpu", weight, gradient, rank, pruned, 0.1 * columns)
    in_triton("candidate_gradient", "cpu", weight, gradient, rank, pruned)
    in_triton("rank_in_row", "cpu", weight)
    group = min(columns, 128)
    square = torch.eye(group, columns)[:, :group]
    in_triton("obs_columns", "cpu", weight.float()[:, :group], square, weight[:, :group] > 0)


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="needs Triton's compiler")
def test_all_but_a_row_s_cut_is_loaded_sixteen_bytes_at_a_time(monkeypatch, tmp_path):
    """By a thread: 32 weights and their ranks, and 16 weights, gradients and ranks; 40 and 35 loads they once were."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = []
    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", lambda *a, **named: ptx.append(compile_only(*a, **named)))
    weight, gradient, rank, pruned = draw((48, 4096), torch.bfloat16)
    in_triton("masked_weight", "cpu", weight, rank, pruned)
    in_triton("count_gradient", "cpu", weight, gradient.contiguous(), rank, pruned, 400.0)
    loads = [Counter(re.findall(r"ld\.global\.(\S+)", code)) for code in ptx]
    assert [found.pop("v4.b32") for found in loads] == [8, 6]
    assert [sum(found.values()) for found in loads] == [2, 1]


@pytest.mark.skipif(INTERPRETED, reason="about a process without Triton")
def test_without_triton_the_references_run():
    program = (
        "import sys; sys.modules['triton'] = None\n"  # as if it were not installed
        "import torch; from besa_exp.tensors import kernels; assert not kernels.HAS_TRITON\n"
        "assert kernels.rank_in_row(torch.tensor([[2.0, 1.0]])).tolist() == [[1, 0]]"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@on_devices("recorded", [], [(False,), (True,)])
def test_on_a_device_the_kernel_runs_unless_a_gradient_is_recorded(device, recorded, monkeypatch):
    calls = []
    module = importlib.import_module("besa_exp.tensors.kernels.masked_weight_triton")
    launch = module._kernel.run
    monkeypatch.setattr(module._kernel, "run", lambda *args, **named: calls.append(1) or launch(*args, **named))
    weight, _, rank, pruned = (value.to(device) for value in draw((5, 63), torch.float32))
    result = kernels.masked_weight(weight.requires_grad_(recorded), rank, pruned)
    assert (result.requires_grad, len(calls)) == (recorded, not recorded)
