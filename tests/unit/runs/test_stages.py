"""A run's stages: a structure and a recovery made by hand stand in their places, are saved, told and gone on with."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reloaded_here import reload_here
from safetensors.torch import load_file, save_file
from tiny_llama import INPUT_IDS, tiny_llama

from besa_exp.blocks.block import Block
from besa_exp.blocks.reports import RecoveryReport, Removed, Size, StructureReport
from besa_exp.checkpoints.files import masks_description
from besa_exp.checkpoints.load import load_model
from besa_exp.cli.main import main
from besa_exp.errors import ConfigurationError, Interrupted, RunError
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.run_folder.folder import read_results
from besa_exp.runs import prune as prune_run
from besa_exp.runs import save as save_run
from besa_exp.runs.evaluate import check_same_zeros, counted_blocks
from besa_exp.runs.prune_model import prune_model
from besa_exp.runs.rewrite import rewritten
from besa_exp.runs.run import Run, Work
from besa_exp.runs.save import save
from besa_exp.runs.score import score_dense, score_pruned
from besa_exp.settings import (
    CalibrationSettings,
    EvaluatorSettings,
    ModelSettings,
    RunSettings,
    SaveSettings,
    TrackerSettings,
)

RECOVERY = RecoveryReport("by_hand", 3.5, 3.25, steps=4, best_step=2, tokens=64)
LOADS = ("whole", "streamed")
Stage = Callable[[Run, Work], Work]


@pytest.fixture
def request_of(tmp_path: Path) -> Callable[[str], RunSettings]:
    """A request to prune a model of three blocks, by the way that it is loaded."""
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    save_file({"input_ids": INPUT_IDS}, tmp_path / "tokens.safetensors")
    tokens = str(tmp_path / "tokens.safetensors")

    def request(load: str) -> RunSettings:
        return RunSettings(
            ModelSettings("tiny", str(tmp_path / "dense"), load=load),  # type: ignore[arg-type]
            CalibrationSettings("tokens", tokens, batch_size=2),
            SparseGPT(group_size=32),
            "sparsegpt",
            EvaluatorSettings("test", perplexity_sets=(tokens,), dense=True),
            TrackerSettings("none"),
            device="cpu",
            offline=True,
            save=SaveSettings(verify=False),
        )

    return request


def run_with(monkeypatch: pytest.MonkeyPatch, settings: RunSettings, folder: Path, *stages: Stage) -> dict[str, Any]:
    """The results of a run with these stages, from the dense scores to the saving."""
    monkeypatch.setattr(prune_run, "STAGES", (score_dense, *stages, save, score_pruned))
    return prune_run.prune(settings, folder, {"model": {"path": settings.model.path}})


def without_block_1(run: Run, work: Work) -> Work:
    """A structure: the middle block is removed, the model goes by a folder of its own."""
    narrowed = run.folder.path.parent / "narrowed"
    dense = load_model(replace(run.settings.model, load="whole"), run.device, True).model
    costs = [sum(tensor.numel() for tensor in block.parameters()) for block in dense.model.layers]
    matrices = sum(tensor.numel() for tensor in dense.model.layers[1].parameters() if tensor.ndim == 2)
    del dense.model.layers[1]
    dense.config.num_hidden_layers = 2
    dense.save_pretrained(narrowed)
    loaded = load_model(replace(run.settings.model, path=str(narrowed)), run.device, True)
    parameters = Size(work.parameters.dense, work.parameters.dense - costs[1])
    report = StructureReport("by_hand", 3, (Removed(1, costs[1]),), Size(3 * matrices, 2 * matrices), parameters)
    return replace(work, loaded=loaded, structure=report, parameters=parameters)


def half_as_large(block: Block) -> None:
    """A recovery's change, exact in floating point: zeros stay zeros."""
    for linear in block.linears.values():
        linear.weight.data.mul_(0.5)


def recovery_by(change: Callable[[Block], None]) -> Stage:
    return lambda run, work: replace(rewritten(work, change), recovery=RECOVERY)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in (folder / "model").glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("load", LOADS)
def test_blocks_that_are_left_are_pruned_and_told_under_their_numbers_in_the_dense_model(
    load, request_of, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    results = run_with(monkeypatch, request_of(load), folder, without_block_1, prune_model)
    assert [block["index"] for block in results["blocks"]] == [0, 2]
    assert results["measured_sparsity"] == pytest.approx(0.5, abs=0.01)
    found = saved(folder)
    assert {name.split(".")[2] for name in found if ".layers." in name} == {"0", "1"}
    assert results["parameters"]["left"] == sum(tensor.numel() for tensor in found.values())
    assert results["parameters"]["dense"] > results["parameters"]["left"]
    assert StructureReport.from_dict(results["structure"], results["parameters"]).kept == (0, 2)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["block"] for line in metrics if line["kind"] == "block"] == [0, 2]
    assert (folder / "sparsity.csv").read_text().splitlines()[-1].startswith("2,")
    assert "1 of 3 blocks (index 1) by by_hand" in (folder / "model" / "README.md").read_text()
    assert "structure" in masks_description(folder / "masks.safetensors")
    counted = counted_blocks(folder / "model")
    check_same_zeros(folder, results["blocks"], counted)
    counted[1]["linears"]["mlp.up_proj"]["pruned"] += 1
    with pytest.raises(ConfigurationError, match=r"block index 1, mlp\.up_proj holds"):
        check_same_zeros(folder, results["blocks"], counted)


@pytest.mark.parametrize("load", LOADS)
def test_no_second_model_is_held_while_the_saved_one_is_read_and_scored(load, request_of, tmp_path, monkeypatch):
    reload_here(monkeypatch)
    held: list[weakref.ref[torch.Tensor]] = []

    def noting(run: Run, work: Work) -> Work:
        held.extend(weakref.ref(parameter) for parameter in work.loaded.model.parameters())
        return work

    def scoring(run: Run, work: Work) -> Work:
        left = [parameter for found in held if (parameter := found()) is not None and not parameter.is_meta]
        assert held
        assert not left
        return score_pruned(run, work)

    monkeypatch.setattr(prune_run, "STAGES", (prune_model, noting, save, scoring))
    settings = request_of(load)
    verified = replace(settings, save=SaveSettings(), evaluator=replace(settings.evaluator, dense=False))
    results = prune_run.prune(verified, tmp_path / "run", {"model": {"path": settings.model.path}})
    assert results["reloaded"]["token_loss"] == pytest.approx(results["reloaded"]["expected"], rel=1e-3)


def test_a_model_of_several_files_is_saved_as_links_to_its_finished_blocks(request_of, tmp_path, monkeypatch):
    settings, seen = request_of("whole"), []

    def linked(run: Run, work: Work) -> Work:
        files = [*run.folder.model.glob("*.safetensors")]
        seen.extend([file.name for file in files if file.samefile(block)] for block in work.finished.weight_files(3))
        return work

    plain, by_block = tmp_path / "plain", tmp_path / "by_block"
    monkeypatch.setattr(prune_run, "STAGES", (prune_model, save, linked, score_pruned))
    asked = replace(settings, evaluator=replace(settings.evaluator, dense=False))
    expected = prune_run.prune(asked, plain, {"model": {"path": settings.model.path}})
    assert seen == [[], [], []]
    monkeypatch.setattr(save_run, "ONE_FILE", 0)
    found = prune_run.prune(asked, by_block, {"model": {"path": settings.model.path}})
    assert seen[3:] == [[f"model-0000{number}-of-00004.safetensors"] for number in (2, 3, 4)]
    assert found["perplexity"] == expected["perplexity"]
    tensors = saved(by_block)
    assert tensors.keys() == saved(plain).keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in saved(plain).items())
    assert masks_description(by_block / "masks.safetensors")["layout"] == "streamed"


def test_the_dense_model_goes_when_a_structure_has_put_another_in_its_place(request_of, tmp_path, monkeypatch):
    dense: list[weakref.ref[torch.nn.Module]] = []

    def noting(run: Run, work: Work) -> Work:
        dense.append(weakref.ref(work.loaded.model))
        return work

    def pruning(run: Run, work: Work) -> Work:
        gc.collect()
        assert dense[0]() is None
        return prune_model(run, work)

    run_with(monkeypatch, request_of("whole"), tmp_path / "run", noting, without_block_1, pruning)


@pytest.mark.parametrize("load", LOADS)
def test_what_a_recovery_makes_of_the_weights_is_saved_scored_and_told(load, request_of, tmp_path, monkeypatch, capsys):
    plain, tuned = tmp_path / "plain", tmp_path / "tuned"
    before = run_with(monkeypatch, request_of(load), plain, prune_model)
    after = run_with(monkeypatch, request_of(load), tuned, prune_model, recovery_by(half_as_large))
    was, found = saved(plain), saved(tuned)
    assert was.keys() == found.keys()
    for name, tensor in was.items():
        assert torch.equal(found[name], 0.5 * tensor if "_proj" in name else tensor), name
    assert after["perplexity"] != before["perplexity"]
    assert after["recovery"] == RECOVERY.to_dict()
    assert "recovery" not in before
    assert after["measured_sparsity"] == before["measured_sparsity"]
    assert "held-out loss 3.5000 before, 3.2500 after" in (tuned / "model" / "README.md").read_text()
    assert "recovery" in masks_description(tuned / "masks.safetensors")
    words = ["--model", str(tmp_path / "dense"), "--out", str(tmp_path / "rebuilt")]
    assert main(["masks", "apply", str(tuned / "masks.safetensors"), *words]) == 2
    assert "the run changed the model by a recovery too" in capsys.readouterr().err


@pytest.mark.parametrize("load", LOADS)
def test_a_recovery_may_move_what_is_outside_the_blocks(load, request_of, tmp_path, monkeypatch):
    def recovery(run: Run, work: Work) -> Work:
        norm = work.loaded.model.state_dict()["model.norm.weight"]
        return replace(rewritten(work, half_as_large, {"model.norm.weight": 0.25 * norm}), recovery=RECOVERY)

    plain, tuned = tmp_path / "plain", tmp_path / "tuned"
    run_with(monkeypatch, request_of(load), plain, prune_model)
    after = run_with(monkeypatch, request_of(load), tuned, prune_model, recovery)
    before, found = saved(plain), saved(tuned)
    assert torch.equal(found["model.norm.weight"], 0.25 * before["model.norm.weight"])
    assert torch.equal(found["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    model = load_model(ModelSettings("tuned", str(tuned / "model")), torch.device("cpu"), True).model
    (perplexity,) = after["perplexity"].values()
    with torch.no_grad():
        assert perplexity == pytest.approx(float(model(INPUT_IDS, labels=INPUT_IDS).loss.exp()), rel=1e-5)


@pytest.mark.parametrize("load", LOADS)
def test_a_recovery_that_fills_a_pruned_weight_is_an_error(load, request_of, tmp_path, monkeypatch):
    def fill(block: Block) -> None:
        block.linears["mlp.up_proj"].weight.data.add_(1.0)

    with pytest.raises(RunError, match=r"layers\.0\.mlp\.up_proj: \d+ pruned weights are not zero"):
        run_with(monkeypatch, request_of(load), tmp_path / "run", prune_model, recovery_by(fill))


def test_kept_scores_are_those_of_the_very_model_that_is_asked_for(request_of, tmp_path, monkeypatch):
    def interrupted(run: Run, work: Work) -> Work:
        raise Interrupted("by hand")

    settings = request_of("whole")
    narrower = replace(settings, model=replace(settings.model, dtype="bfloat16"))
    with pytest.raises(Interrupted):  # no block is there that would say what was asked
        run_with(monkeypatch, settings, tmp_path / "run", interrupted)
    found = run_with(monkeypatch, narrower, tmp_path / "run", prune_model)["dense"]["perplexity"]
    fresh = run_with(monkeypatch, narrower, tmp_path / "elsewhere" / "run", prune_model)["dense"]["perplexity"]
    assert found == fresh
    assert found != run_with(monkeypatch, settings, tmp_path / "wide", prune_model)["dense"]["perplexity"]


def test_a_kept_weight_that_became_zero_is_counted(request_of, tmp_path, monkeypatch):
    def one_less(block: Block) -> None:
        weight = block.linears["mlp.up_proj"].weight.data
        place = weight.flatten().abs().argmax()
        weight.view(-1)[place] = 0.0

    folder = tmp_path / "run"
    results = run_with(monkeypatch, request_of("whole"), folder, prune_model, recovery_by(one_less))
    up = [block["linears"]["mlp.up_proj"] for block in results["blocks"]]
    assert [linear["pruned"] for linear in up] == [64 * 96 // 2 + 1] * 3


def test_a_recovery_that_was_interrupted_goes_on_after_its_last_block(request_of, tmp_path, monkeypatch):
    changed = []

    def interrupted(block: Block) -> None:
        if len(changed) == 2:
            raise Interrupted("by hand")
        changed.append(block.index)
        half_as_large(block)

    def noted(block: Block) -> None:
        changed.append(block.index)
        half_as_large(block)

    settings, folder = request_of("streamed"), tmp_path / "run"
    with pytest.raises(Interrupted):
        run_with(monkeypatch, settings, folder, prune_model, recovery_by(interrupted))
    again = run_with(monkeypatch, settings, folder, prune_model, recovery_by(noted))
    assert changed == [0, 1, 2]
    assert "resuming: 3 of 3 blocks are already pruned" in (folder / "run.log").read_text()
    unbroken = run_with(monkeypatch, settings, tmp_path / "unbroken", prune_model, recovery_by(half_as_large))
    found, expected = saved(folder), saved(tmp_path / "unbroken")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert again["perplexity"] == unbroken["perplexity"] == read_results(folder)["perplexity"]
