"""The block loop of a run: what goes on beside it is written as if it had been waited for, or fails with its reason."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from tiny_llama import INPUT_IDS, tiny_llama

from besa_exp.blocks.activations import allocator
from besa_exp.blocks.block import discover_blocks
from besa_exp.checkpoints.files import weights_sha256
from besa_exp.checkpoints.load import load_model
from besa_exp.errors import RunError
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.run_folder.finished_blocks import FinishedBlocks, block_tensors
from besa_exp.runs.block_loop import BlockLoop
from besa_exp.runs.run import slow_work
from besa_exp.settings import ModelSettings
from besa_exp.tensors.masks import Goal

CPU = torch.device("cpu")


def test_hidden_states_for_which_the_disk_has_no_room_are_refused_at_once(tmp_path):
    """Met later, in mapped memory, a full disk would end the process without a word."""
    place, allocate = allocator("disk", CPU, tmp_path, 0)
    assert (place, allocate(torch.Size([2, 3]), torch.bfloat16).fill_(1).sum()) == ("disk", 6)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(RunError, match=r"2\.1 MB of hidden states do not fit on this disk"):
            allocate(torch.Size([2**19]), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def looped(folder, load, blocks, told, num_blocks=4):
    """A loop with SparseGPT over a model in `folder` that keeps its blocks in `blocks`; the hashes of dense blocks."""
    model = tiny_llama(num_hidden_layers=num_blocks)
    path, modules = discover_blocks(model)
    dense = [weights_sha256(block_tensors(module, f"{path}.{number}")) for number, module in enumerate(modules)]
    model.save_pretrained(folder)
    loaded = load_model(ModelSettings(name="tiny", path=str(folder), load=load), CPU, offline=True)
    finished = FinishedBlocks(blocks)
    finished.begin()
    loop = BlockLoop(loaded, INPUT_IDS, 5, finished, 0, allocator("device", CPU, folder, 0)[1])

    def run():
        loop.run(SparseGPT(group_size=32), Goal(0.5), None, lambda step: None, told.append)

    return run, dense


@pytest.mark.parametrize("load", ["whole", "streamed"])
def test_each_blocks_record_holds_the_hash_of_its_dense_weights(load, tmp_path):
    run, dense = looped(tmp_path / "model", load, tmp_path / "blocks", [])
    run()
    records = [json.loads(file.read_text()) for file in sorted((tmp_path / "blocks").glob("00000?.json"))]
    assert [record["dense_sha256"] for record in records] == dense


def test_a_block_that_cannot_be_written_ends_the_loop_with_the_reason_and_keeps_those_before(tmp_path):
    reported = []
    run, _ = looped(tmp_path / "model", "streamed", tmp_path / "blocks", reported)
    (tmp_path / "blocks" / "000001.safetensors" / "in the way").mkdir(parents=True)
    with pytest.raises(RunError, match=r"block index 1 could not be written.*the blocks before it are kept"):
        run()
    assert [report.index for report in reported] == [0, 1]
    assert sorted(file.name for file in (tmp_path / "blocks").glob("*.json")) == ["000000.json", "identity.json"]


def test_the_plan_says_what_of_the_work_is_slow():
    assert slow_work("cuda", torch.bfloat16, "auto", 8, 8) == {}
    assert slow_work("cpu", torch.float32, "auto") == {}
    assert slow_work("cuda", torch.float32, "bfloat16") == {}
    assert "compute_dtype=bfloat16" in slow_work("cuda", torch.float32, "auto")["products"]
    assert slow_work("cpu", torch.float32, "auto", 8, 1)["ranks"].startswith("8: a step of pruner.batch_size=1 keeps 1")
