"""The block loop of a run: what goes on beside it is written as if it had been waited for, or fails with its reason."""

from __future__ import annotations

import json
import resource
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import INPUT_IDS, tiny_llama

from besa_exp.blocks.activations import allocator
from besa_exp.blocks.block import discover_blocks
from besa_exp.blocks.pruner import Pruner, Traits
from besa_exp.blocks.whole_model import Found
from besa_exp.checkpoints.files import masks_description, weights_sha256
from besa_exp.checkpoints.load import LoadedModel, load_model
from besa_exp.dry_run.sizes import model_without_weights
from besa_exp.errors import ConfigurationError, RunError
from besa_exp.methods.pruners.besa_reconstruct import BesaReconstruct
from besa_exp.methods.pruners.model_tuning import ModelTuning
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.methods.updates.updated import with_update
from besa_exp.run_folder.finished_blocks import FinishedBlocks, block_tensors
from besa_exp.runs.block_loop import BlockLoop
from besa_exp.runs.prune_model import check_refinements
from besa_exp.runs.run import slow_work
from besa_exp.settings import CalibrationSettings, EvaluatorSettings, ModelSettings, RunSettings, TrackerSettings
from besa_exp.tensors.masks import Goal

CPU = torch.device("cpu")
SETTINGS = RunSettings(
    ModelSettings("tiny", "tiny"), CalibrationSettings("local"), SparseGPT(), "sparsegpt", EvaluatorSettings("none"),
    TrackerSettings("none"),
)  # fmt: skip


def test_hidden_states_for_which_the_disk_has_no_room_are_refused_at_once(tmp_path):
    """Met later, in mapped memory, a full disk would end the process without a word."""
    place, allocate = allocator("disk", CPU, tmp_path, 0)
    assert (place, allocate(torch.Size([2, 3]), torch.bfloat16).fill_(1).sum()) == ("disk", 6)
    assert allocate(torch.Size([0, 3]), torch.bfloat16).shape == (0, 3)  # of a rank that owns no sample
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(RunError, match=r"2\.1 MB that are to lie in a file do not fit on this disk"):
            allocate(torch.Size([2**19]), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def looped(folder, load, blocks, told, num_blocks=4, keeps_dense=False, pruner: Pruner | None = None):
    """A loop with the pruner, SparseGPT by default, over a model in `folder`, which keeps its blocks in `blocks`; the
    hashes of dense blocks."""
    model = tiny_llama(num_hidden_layers=num_blocks)
    path, modules = discover_blocks(model)
    dense = [weights_sha256(block_tensors(module, f"{path}.{number}")) for number, module in enumerate(modules)]
    model.save_pretrained(folder)
    loaded = load_model(ModelSettings(name="tiny", path=str(folder), load=load), CPU, offline=True)
    finished = FinishedBlocks(blocks)
    finished.begin()
    loop = BlockLoop(loaded, INPUT_IDS, 5, finished, 0, allocator("device", CPU, folder, 0)[1], keeps_dense=keeps_dense)

    def run():
        loop.run(pruner or SparseGPT(group_size=32), Goal(0.5), None, lambda step: None, told.append)
        return loop

    return run, dense


@pytest.mark.parametrize("load", ["whole", "streamed"])
def test_each_blocks_record_holds_the_hash_of_its_dense_weights(load, tmp_path):
    run, dense = looped(tmp_path / "model", load, tmp_path / "blocks", [])
    run()
    records = [json.loads(file.read_text()) for file in sorted((tmp_path / "blocks").glob("00000?.json"))]
    assert [record["dense_sha256"] for record in records] == dense


@dataclass(frozen=True)
class NormsAlone:
    """An update that moves no weight of a linear."""

    traits = Traits()

    def check(self, pattern):
        return []

    def update_block(self, task, pruned):
        path = "input_layernorm.weight"
        return replace(pruned, norms={path: 2 * task.block.module.get_parameter(path)})


@pytest.mark.parametrize("update", [None, NormsAlone()])
def test_masks_say_whether_the_model_can_be_made_of_them_alone(update, tmp_path):
    """One whose norms moved cannot: `besa masks apply` would make another model without a word."""
    run, _ = looped(tmp_path / "model", "whole", tmp_path / "blocks", [], pruner=with_update(Uniform("wanda"), update))
    loop = run()
    moved = [masks_description(file)["weights_updated"] for file in loop.finished.mask_files(4)]
    assert moved == 4 * [update is not None]


def test_a_block_that_cannot_be_written_ends_the_loop_with_the_reason_and_keeps_those_before(tmp_path):
    reported = []
    run, _ = looped(tmp_path / "model", "streamed", tmp_path / "blocks", reported)
    (tmp_path / "blocks" / "000001.safetensors" / "in the way").mkdir(parents=True)
    with pytest.raises(RunError, match=r"block index 1 could not be written.*the blocks before it are kept"):
        run()
    assert [report.index for report in reported] == [0, 1]
    assert sorted(file.name for file in (tmp_path / "blocks").glob("*.json")) == ["000000.json", "identity.json"]


@dataclass(frozen=True)
class _Tuning(ModelTuning):
    """Keeps what it begins with."""

    begun: list[Found] = field(default_factory=list)

    def refine(self, whole, found, on_step):
        dense = tiny_llama(num_hidden_layers=4).state_dict()
        for number, block in enumerate(whole.blocks(False)):
            for name, linear in block.linears.items():
                assert torch.equal(linear.weight, dense[f"model.layers.{number}.{name}.weight"])
        self.begun.extend(found)
        return super().refine(whole, found, on_step)


def test_what_follows_begins_with_the_finished_blocks_whether_the_model_is_whole_or_streamed(tmp_path):
    tuned = []
    for load in ("whole", "streamed"):
        run, _ = looped(tmp_path / "model", load, tmp_path / load, reports := [], keeps_dense=True)
        tuning = _Tuning(steps=2, batch_size=1)
        decided = run().refined([tuning], reports, lambda step: None)
        for index, own in enumerate(tuning.begun):
            written = load_file(tmp_path / load / f"{index:06d}.safetensors")
            assert own.weights is not None
            for name, weight in own.weights().items():
                assert torch.equal(weight, written[f"model.layers.{index}.{name}.weight"])
                assert torch.equal(own.keep_masks()[name], weight != 0)
        tuned.append([one.weights() for one in decided.found if one.weights])
        assert len(tuned[-1]) == len(tuning.begun)
    for whole, streamed in zip(*tuned, strict=True):
        assert all(torch.equal(streamed[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize(("memory", "disk", "fits"), [(2**50, 0, True), (2**36, 2**40, True), (2**36, 2**38, False)])
def test_steps_over_the_whole_model_that_fit_nowhere_are_refused_before_any_work(
    memory, disk, fits, tmp_path, monkeypatch, caplog
):
    """Llama 2 70B at 50 %: 8 bytes a weight, 548 GB, in memory or in files, and 9 GB of bits in memory."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=disk))
    asked = ModelSettings(name="llama2_70b", path="meta-llama/Llama-2-70b-hf", load="streamed")
    loaded = LoadedModel(model_without_weights(asked, offline=True), None, None, tmp_path)
    best = BesaReconstruct(model=ModelTuning())
    settings = replace(SETTINGS, model=asked, pruner=best, sparsity=0.5)
    with nullcontext() if fits else pytest.raises(ConfigurationError, match=r"556\.\d GB of all 68.* weights.*leave"):
        check_refinements(settings, loaded, tmp_path)
    assert ("will work in files" in caplog.text) == (fits and disk > 0)


def test_the_plan_says_what_of_the_work_is_slow():
    assert slow_work("cuda", torch.bfloat16, "auto", 8, 8) == {}
    assert slow_work("cpu", torch.float32, "auto") == {}
    assert slow_work("cuda", torch.float32, "bfloat16") == {}
    assert "compute_dtype=bfloat16" in slow_work("cuda", torch.float32, "auto")["products"]
    assert slow_work("cpu", torch.float32, "auto", 8, 1)["ranks"].startswith("8: a step of pruner.batch_size=1 keeps 1")
