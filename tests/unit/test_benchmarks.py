"""The benchmark of blocks runs, in small, on what the package is today."""

from __future__ import annotations

import importlib
import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_llama

from besa_exp.blocks.block import capture_blocks, embed

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("blocks")
    for name in ("blocks", "authors_way", "machine"):
        sys.modules.pop(name, None)


@pytest.fixture
def real_block(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("real_block")
    for name in ("real_block", "machine"):
        sys.modules.pop(name, None)


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("recovery")
    for name in ("recovery", "real_block", "machine"):
        sys.modules.pop(name, None)


def test_every_line_of_a_block_is_measured_against_its_floor_and_the_authors_way(blocks) -> None:
    case = blocks.Case("tiny", 32, 48, 2, 1, samples=8, seq_len=16)
    make = partial(blocks.make_work, case, torch.device("cpu"), torch.float32)
    cells = blocks.run_case(case.name, make, rounds=1)
    assert [cell.what for cell in cells] == [
        "BESA step",
        "BESA",
        "Wanda",
        "SparseGPT",
        "SparseGPT's Hessians and factors",
    ]
    assert all(cell.seconds > 0 for cell in cells)
    assert [cell.what for cell in cells if cell.floor is None] == ["SparseGPT's Hessians and factors"]
    assert [cell.what for cell in cells if cell.authors is None] == ["Wanda"]
    assert [cell.what for cell in cells if cell.authors_eager is None] == ["Wanda", "SparseGPT's Hessians and factors"]


def test_a_model_of_many_blocks_is_one_block_filled_again_and_again(blocks) -> None:
    case = blocks.Case("tiny", 32, 48, 2, 1, samples=8, seq_len=16, blocks=3)
    work = blocks.make_work(case, torch.device("cpu"), torch.float32)
    dense = {name: weight.clone() for name, weight in work.dense[0].items()}
    seen = 0
    for block in work:
        assert all(torch.equal(linear.weight, dense[name]) for name, linear in block.linears.items())
        block.linears["mlp.up_proj"].weight.detach().zero_()  # as if it had been pruned
        seen += 1
    assert seen == 3


def test_each_method_is_measured_on_a_block_and_prunes_it(real_block) -> None:
    model = tiny_llama(context=32).requires_grad_(False)
    tokens = torch.randint(0, 258, (16, 24), generator=torch.Generator().manual_seed(1))
    block = capture_blocks(model, tokens)[0]
    inputs = embed(model, [block], tokens, 4)
    assert [*real_block.METHODS] == ["two passes", "wanda", "sparsegpt", "besa", "best"]
    for method in real_block.METHODS:
        found = real_block.measured(method, block, inputs)
        assert found["seconds"] > 0
        assert found["block_bytes"] == sum(linear.weight.nbytes for linear in block.linears.values())
        zeros = sum(int((linear.weight == 0).sum()) for linear in block.linears.values())
        assert (zeros > 0.49 * found["block_bytes"] / 4) == (method != "two passes")


@pytest.fixture
def bench_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setitem(sys.modules, "prodigyopt", None)  # not on a GPU machine, where the rest of a run is absent too
    yield importlib.import_module("bench_gpu")
    for name in ("bench_gpu", "blocks", "authors_way", "kernels", "streaming", "machine"):
        sys.modules.pop(name, None)


def test_all_that_is_asked_of_a_gpu_runs_in_small_and_is_written(bench_gpu, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--toy", "--out", str(tmp_path / "gpu.json")])
    bench_gpu.main()
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert {"chip", "torch", "transformers", "triton"} <= record["machine"].keys()
    cases = record["cases"]
    assert not [name for name, found in cases.items() if "failed" in found or "not run" in found]
    assert {f"toy block, {name}" for name in ("wanda", "besa", "sparsegpt", "best")} < cases.keys()
    assert cases["toy block, besa"].keys() == {"this seconds", "floor seconds", "authors seconds"}
    assert cases["toy mixture, besa"].keys() == {"this seconds", "floor seconds"}
    assert cases["streamed model"]["blocks"] == 3
    assert all(found["equal"] for found in cases["selection from a long row"].values())


def test_no_case_begins_without_time(bench_gpu, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--toy", "--minutes", "0", "--out", str(tmp_path / "gpu.json")])
    bench_gpu.main()
    assert {*map(str, json.loads((tmp_path / "gpu.json").read_text())["cases"].values())} == {
        "{'not run': 'no time was left'}"
    }


def test_a_case_is_cut_off_when_the_time_is_over_and_those_before_stay_as_they_are(bench_gpu) -> None:
    began = time.monotonic()
    found = bench_gpu.within(0.2, lambda: time.sleep(60))
    assert time.monotonic() - began < 30
    assert "the time was over" in found["failed"]
    assert bench_gpu.within(60.0, lambda: {"seconds": 1.0}) == {"seconds": 1.0}


def test_a_step_of_recovery_is_timed_beside_a_plain_one_that_keeps_the_same_zeros(recovery) -> None:
    seconds = recovery.seconds_of(recovery.TINY, rounds=1)
    row = recovery.row_of(recovery.TINY, seconds)
    assert [*row["ratio"]] == ["plain", "full", "lora"]
    assert row["ratio"]["plain"] == 1.0
    model, keep = recovery.pruned_model(recovery.TINY)
    recovery.plain(model, keep)(recovery.windows_of(recovery.TINY, 0), 0)
    for name, bits in keep.items():
        assert not model.get_parameter(name)[~bits.mask()].any()
