"""Runs that take whole blocks, heads or channels out: what is saved loads anywhere, and is what the method decided. End
to end because a structure passes every stage of a run, saved files and kills among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from reloaded_here import reload_here
from resumed_runs import assert_equal_runs, killed
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_llama
from transformers import AutoModelForCausalLM

import besa_exp
from besa_exp.checkpoints.narrowed_model import narrowed_model
from besa_exp.checkpoints.structure import Structure, from_json
from besa_exp.cli.main import main
from besa_exp.errors import ConfigurationError

IDS = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five blocks of two groups of heads and 48 channels."""
    folder = tmp_path_factory.mktemp("dense")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5}
    tiny_llama(32, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def asked(dense_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(0, 64, (16, 24), generator=generator)}, tokens)
    scored = ["evaluator=perplexity", f"evaluator.perplexity_sets=[{tokens}]"]
    chosen = ["tracker=none", "device=cpu", "model.dtype=float32", "save.verify=false", *scored]
    return ["prune", f"model.path={dense_dir}", f"calibration.path={tokens}", *chosen]


def run(asked: list[str], folder: Path, *arguments: str) -> dict[str, Any]:
    assert main([*asked, *arguments, f"hydra.run.dir={folder}"]) == 0
    assert not (folder / "narrowed").exists()
    return json.loads((folder / "results.json").read_text())


def loaded(folder: Path) -> Any:
    """By transformers alone, without a missing, unexpected or ill-shaped tensor."""
    read: Any = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    model, told = read
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


def structure_of(folder: Path) -> Structure:
    return from_json((folder / "structure.json").read_text())


@pytest.mark.parametrize("load", ["whole", "streamed"])
def test_blocks_are_removed_and_nothing_else_changes(
    load: str, asked: list[str], dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["structure=shortgpt", "structure.blocks=2", "pruner=dense", f"model.load={load}"]
    found = run(asked, tmp_path / "run", *arguments)
    kept = structure_of(tmp_path / "run").blocks
    influence = json.loads((tmp_path / "run" / "structure_search.json").read_text())["influence"]
    assert sorted(set(range(5)) - {*kept}) == sorted(sorted(range(5), key=influence.__getitem__)[:2])
    dense = AutoModelForCausalLM.from_pretrained(dense_dir).eval()
    saved = loaded(tmp_path / "run")
    assert len(saved.model.layers) == 3
    expected = narrowed_model(dense, Structure(kept))
    assert torch.equal(saved(IDS).logits, expected(IDS).logits)
    assert [block["index"] for block in found["blocks"]] == [*kept]
    assert (found["measured_sparsity"], found["target_sparsity"], found["pruner"]) == (0.0, 0.0, "shortgpt+dense")
    assert found["parameters"] == {"dense": dense.num_parameters(), "left": saved.num_parameters()}
    assert found["structure"]["weights"]["left"] * 5 == found["structure"]["weights"]["dense"] * 3
    assert [change["kind"] for change in found["structure"]["blocks"]] == ["removed", "removed"]
    said = capsys.readouterr().out
    assert "missed its target" not in said
    assert f"2 of 5 blocks removed (index {', '.join(str(i) for i in range(5) if i not in kept)})" in said


def test_what_is_left_is_pruned_and_streamed_runs_are_the_same(asked: list[str], tmp_path: Path) -> None:
    folders = {load: tmp_path / load for load in ("whole", "streamed")}
    arguments = ["structure=sleb", "structure.blocks=1", "pruner=wanda", "budget=owl", "update=barber"]
    found = {load: run(asked, folder, *arguments, f"model.load={load}") for load, folder in folders.items()}
    assert found["whole"]["pruner"] == "sleb+owl+wanda+barber"
    assert found["whole"]["measured_sparsity"] == pytest.approx(0.5, abs=5e-4)
    assert [block["index"] for block in found["whole"]["blocks"]] == [*structure_of(folders["whole"]).blocks]
    states = [loaded(folder).state_dict() for folder in folders.values()]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    zeros = sum(int((weight == 0).sum()) for name, weight in states[0].items() if "_proj" in name)
    assert zeros == sum(row["pruned"] for block in found["whole"]["blocks"] for row in block["linears"].values())


@pytest.mark.parametrize("method", ["wanda_sp", "policy_gradient"])
def test_widths_shrink_evenly_and_what_is_left_is_the_masked_model(
    method: str, asked: list[str], dense_dir: Path, tmp_path: Path
) -> None:
    more = ["structure.steps=3", "structure.rate=0.1"] if method == "policy_gradient" else []
    arguments = [f"structure={method}", "structure.ratio=0.3", "structure.multiple=8", "pruner=dense", *more]
    found = run(asked, tmp_path / "run", *arguments)
    structure, saved = structure_of(tmp_path / "run"), loaded(tmp_path / "run")
    assert structure.groups is not None
    assert structure.channels is not None
    assert len({len(kept) for kept in structure.channels}) == 1
    assert saved.config.intermediate_size == len(structure.channels[0])
    assert saved.config.intermediate_size % 8 == 0
    assert saved.config.num_key_value_heads == len(structure.groups[0])
    dense = AutoModelForCausalLM.from_pretrained(dense_dir).eval()
    expected = narrowed_model(dense, structure)
    assert torch.equal(saved(IDS).logits, expected(IDS).logits)
    assert found["parameters"]["left"] <= 0.7 * found["parameters"]["dense"]
    assert {change["kind"] for change in found["structure"]["blocks"]} == {"narrowed"}


@pytest.mark.parametrize("saved_as", ["padded", "custom_code"])
def test_uneven_widths_are_pruned_as_they_are_and_saved_as_asked(
    saved_as: str, asked: list[str], dense_dir: Path, tmp_path: Path
) -> None:
    words = ["structure=policy_gradient", "structure.shape=uneven", f"structure.save={saved_as}", "structure.ratio=0.3"]
    trusted = saved_as == "custom_code"  # a fresh process needs the modelling file
    words += ["structure.steps=3", "structure.rate=0.5", "pruner=wanda", f"save.verify={str(trusted).lower()}"]
    found = run(asked, tmp_path / "run", *words)
    structure = structure_of(tmp_path / "run")
    assert not structure.is_uniform
    assert found["structure"]["saved_as"] == saved_as
    assert found["measured_sparsity"] == pytest.approx(0.5, abs=0.01)  # zeros among what is left, none that pads
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", trust_remote_code=trusted).eval()
    dense = AutoModelForCausalLM.from_pretrained(dense_dir).eval()
    small = narrowed_model(dense, structure, uneven=True)
    assert (
        small.num_parameters()
        == found["parameters"]["left"]
        == found["cost"]["parameters"] - (saved.num_parameters() - found["parameters"]["left"])
    )
    assert (saved.num_parameters() == small.num_parameters()) == trusted
    (name,) = found["perplexity"]
    assert main(["evaluate", f"checkpoint={tmp_path / 'run'}", "tracker=none", "evaluator=perplexity", "device=cpu",
                 f"evaluator.perplexity_sets=[{name}]", f"model.trust_remote_code={trusted}"]) == 0  # fmt: skip


@pytest.mark.parametrize(
    ("method", "steps", "total"),
    [
        (["structure=sleb", "structure.blocks=3"], [1, 2], 3),
        (["structure=policy_gradient", "structure.steps=20", "structure.ratio=0.3"], [10], 20),
    ],
)
def test_a_search_that_is_killed_goes_on_and_ends_the_same(
    method: list[str],
    steps: list[int],
    total: int,
    asked: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*method, "pruner=wanda"]
    run(asked, tmp_path / "unbroken", *arguments)
    folder = tmp_path / "run"
    seen = killed([*asked, *arguments], folder, [{"structure": step} for step in steps] + [{"blocks": 1}])
    assert seen[0]["structure"] >= steps[0]
    assert not seen[0]["blocks"]
    capsys.readouterr()
    run(asked, folder, *arguments)
    assert "structure: as structure.json has it" in capsys.readouterr().out
    if seen[0]["structure"] < total:  # it was not over yet
        assert "going on after" in (folder / "run.log").read_text()
    for name in ("structure.json", "structure_search.json"):
        assert (folder / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    assert_equal_runs(folder, tmp_path / "unbroken")


def test_an_unfinished_structure_is_not_taken_for_another_request(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    killed([*asked, "structure=sleb", "structure.blocks=3", "pruner=wanda"], folder, [{"structure": 1}])
    assert main([*asked, "structure=sleb", "structure.blocks=2", "pruner=wanda", f"hydra.run.dir={folder}"]) == 2
    assert "structure.blocks: 3 before, 2 now" in capsys.readouterr().err


def test_widths_that_break_the_pattern_are_refused_with_the_remedy(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["structure=random_sp", "structure.ratio=0.2", "pruner=wanda", "pattern=2:4"]
    assert main([*asked, *arguments, f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    assert "set structure.multiple=4" in " ".join(capsys.readouterr().err.split())
    assert main([*asked, *arguments, "structure.multiple=4", f"hydra.run.dir={tmp_path / 'again'}"]) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["structure=shortgpt", "structure.blocks=5"], "would remove all 5 blocks; at least one must stay"),
        (["structure=sleb", "structure.blocks=4"], "would remove 4 blocks, and 3 of the 5 are not protected"),
        (["structure=angular", "structure.ratio=1.5"], "must be above 0 and below 1"),
        (["structure=wanda_sp", "structure.ratio=0.95"], "no width meets it"),
        (["structure=wanda_sp", "structure.multiple=64"], "must be in [1, 48], the channels of a block"),
        (["structure=policy_gradient", "structure.shape=uneven", "model.load=streamed"], "set model.load=whole"),
        (["structure=shortgtp"], "did you mean shortgpt?"),
    ],
)
def test_what_cannot_be_removed_is_refused_before_a_weight_is_read(
    arguments: list[str], told: str, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked, *arguments, "pruner=dense", f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_widths_of_experts_are_refused(asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("mixtral").save_pretrained(tmp_path / "mixtral")
    words = [word for word in asked if not word.startswith("model.path")]
    arguments = [f"model.path={tmp_path / 'mixtral'}", "structure=wanda_sp", f"hydra.run.dir={tmp_path / 'run'}"]
    assert main([*words, *arguments]) == 2
    assert "mixtures of experts, whose channels cannot be removed" in " ".join(capsys.readouterr().err.split())


def test_masks_do_not_rebuild_a_model_of_which_parts_are_gone(
    asked: list[str], dense_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(asked, tmp_path / "run", "structure=shortgpt", "structure.blocks=1", "pruner=wanda")
    words = ["masks", "apply", str(tmp_path / "run" / "masks.safetensors")]
    assert main([*words, "--model", str(dense_dir), "--out", str(tmp_path / "out")]) == 2
    assert "the run changed the model by a structure too" in " ".join(capsys.readouterr().err.split())


def test_a_path_is_narrowed_from_python_and_an_object_is_not(
    dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reload_here(monkeypatch)
    asked: dict[str, Any] = {"pruner": "dense", "structure": besa_exp.preset("structure", "shortgpt")}
    besa_exp.prune(str(dense_dir), None, IDS, out=tmp_path / "run", **asked)
    assert len(loaded(tmp_path / "run").model.layers) == 4
    assert load_file(tmp_path / "run" / "masks.safetensors")
    with pytest.raises(ConfigurationError, match="structure= is for a path"):
        besa_exp.prune(tiny_llama(), None, IDS, **asked)
