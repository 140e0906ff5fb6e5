"""Searches over the whole model, after the block loop: through the command line, streamed, killed, and with N:M. End to
end because they begin with what the block loop left on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from resumed_runs import BLOCKS, assert_equal_runs, killed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from besa_exp.cli.main import main

SHORT = ["pruner.model.steps=6", "pruner.model.checks=2"]
MODEL = ["pruner.scope=model", *SHORT]
BEST = ["pruner=best", "pruner.tuning.epochs=1", "pruner.model.steps=4", "pruner.model.lr=0.01"]


def run(arguments: list[str], folder: Path) -> Path:
    assert main([*arguments, f"hydra.run.dir={folder}"]) == 0
    return folder


def lines_of(folder: Path, kind: str) -> list[dict]:
    return [{**line, "time": ""} for line in timed_lines_of(folder, kind)]


def timed_lines_of(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((folder / "model").glob("*.safetensors")):
        tensors |= load_file(file)
    return {name: tensor for name, tensor in tensors.items() if "proj" in name}


@pytest.fixture(scope="module")
def refined(request_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run([*request_arguments, *MODEL], tmp_path_factory.mktemp("refined") / "run")


def test_the_total_is_exact_and_the_course_is_kept(refined, unbroken):
    weights = weights_of(refined)
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    size = sum(weight.numel() for weight in weights.values())
    assert zeros == round(size / 2)
    steps, blocks = lines_of(refined, "model_step"), lines_of(refined, "block")
    assert [step["step"] for step in steps] == list(range(6))
    assert all(step["divergence"] > 0 for step in steps)
    assert [block["block"] for block in blocks] == list(range(BLOCKS))
    blockwise = [{**step, "seconds": 0} for step in lines_of(unbroken, "step")]
    assert [{**step, "seconds": 0} for step in lines_of(refined, "step")] == blockwise
    results = json.loads((refined / "results.json").read_text())
    assert [block["reconstruction_loss"]["before"] for block in results["blocks"]] == [
        block["reconstruction_loss"]["before"]
        for block in json.loads((unbroken / "results.json").read_text())["blocks"]
    ]


def test_a_streamed_model_ends_with_the_same_weights(refined, request_arguments, tmp_path):
    streamed = run([*request_arguments, *MODEL, "model.load=streamed"], tmp_path / "run")
    expected, found = weights_of(refined), weights_of(streamed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_killed_while_it_writes_what_the_search_found_ends_with_the_bytes_of_an_unbroken_one(
    refined, request_arguments, tmp_path
):
    folder = tmp_path / "run"
    killed([*request_arguments, *MODEL], folder, [{"refined": 1}, {"refined": BLOCKS}])
    searched = timed_lines_of(folder, "model_step")
    assert_equal_runs(run([*request_arguments, *MODEL], folder), refined)
    assert timed_lines_of(folder, "model_step") == searched  # whose blocks had all been written


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_best_moves_kept_weights_and_no_zero(pattern, request_arguments, tmp_path):
    folder = run([*request_arguments, *BEST, f"pattern={pattern}", "sparsity=0.5"], tmp_path / "run")
    dense = load_file(Path(request_arguments[1].partition("=")[2]) / "model.safetensors")
    weights = weights_of(folder)
    kept = torch.cat([(weight != 0).flatten() for weight in weights.values()])
    moved = torch.cat([(weight != dense[name]).flatten() for name, weight in weights.items()])
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=1e-4)
    assert float(moved[kept].float().mean()) > 0.9
    if pattern == "2:4":
        assert all((weight.view(len(weight), -1, 4) != 0).sum(-1).eq(2).all() for weight in weights.values())
    assert len(lines_of(folder, "model_step")) == 4


def test_the_losses_of_best_are_of_the_weights_as_saved_against_the_dense_model(request_arguments, tmp_path):
    """That of each block after the search was against the dense block on pruned inputs, six times lower at 60 % of a
    real model, beside one before it against the dense model."""
    folder = run([*request_arguments, *BEST], tmp_path / "run")
    tokens = load_file(Path(request_arguments[2].partition("=")[2]))["input_ids"][-2:]  # an eighth judges
    states = []
    for model in (Path(request_arguments[1].partition("=")[2]), folder / "model"):
        llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).requires_grad_(False)
        found: list[torch.Tensor] = []
        for block in llama.model.layers:
            block.register_forward_hook(lambda _, __, output, found=found: found.append(output))
        llama(tokens)
        states.append(found)
    blocks = json.loads((folder / "results.json").read_text())["blocks"]
    for block, target, output in zip(blocks, *states, strict=True):
        expected = float(((target - output).square().sum(-1) / target.square().sum(-1)).mean())
        assert block["reconstruction_loss"]["after"] == pytest.approx(expected, rel=1e-4)


def test_an_update_follows_the_search(request_arguments, tmp_path):
    folder = run([*request_arguments, *MODEL, "update=obs"], tmp_path / "run")
    dense = load_file(Path(request_arguments[1].partition("=")[2]) / "model.safetensors")
    weights = weights_of(folder)
    name = "model.layers.3.mlp.up_proj.weight"
    assert not torch.equal(weights[name], dense[name] * (weights[name] != 0))
