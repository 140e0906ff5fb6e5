"""Recovery through the real command: zeros stay in the files, held-out text decides, a kill costs nothing. End to end
because the zeros are those of the saved files and the kill is one of a process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from resumed_runs import killed
from safetensors.torch import load_file, save_file

from besa_exp.checkpoints.files import load_masks
from besa_exp.cli.main import main

NO_NEGATIVE_ZERO = "a -0.0 stands in the file"


@pytest.fixture
def tuned(given: list[str], tmp_path: Path) -> list[str]:
    """Arguments of a run that tunes for some steps on tokens that follow a rule, which a random model does not know."""
    rule = torch.arange(60 * 16).view(60, 16) % 7
    save_file({"input_ids": rule}, tmp_path / "rule.safetensors")
    text = [f"recovery.path={tmp_path / 'rule.safetensors'}", "recovery.held_out=4", "recovery.batch_size=4"]
    return ["prune", *given, *text, "recovery.steps=8", "recovery.checks=4", "recovery.lr=0.01"]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def results_in(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def assert_zeros_are_the_masks(folder: Path) -> None:
    """In the saved file each pruned weight is +0.0."""
    weights, masks = weights_in(folder), load_masks(folder / "masks.safetensors")
    assert masks
    for name, keep_mask in masks.items():
        pruned = weights[name][~keep_mask]
        assert torch.equal(pruned, torch.zeros_like(pruned)), name
        assert not torch.signbit(pruned).any(), NO_NEGATIVE_ZERO


@pytest.mark.parametrize("method", ["full", "lora", "scale", "norms", "blocks", "spiel", "sketch", "mezo"])
def test_a_recovery_keeps_every_zero_and_is_not_worse_on_held_out_text(method: str, tuned: list[str]) -> None:
    assert main([*tuned, f"recovery={method}", "hydra.run.dir=run"]) == 0
    results = results_in(Path("run"))
    recovery = results["recovery"]
    assert recovery["method"] == method
    assert recovery["loss"]["after"] <= recovery["loss"]["before"]
    assert recovery["loss"]["after"] < recovery["loss"]["before"] or method in ("blocks", "sketch", "mezo")
    assert (recovery["steps"], recovery["tokens"]) == (8, 8 * 4 * 16)
    assert_zeros_are_the_masks(Path("run"))
    counted = sum(int((weights_in(Path("run"))[name] == 0).sum()) for name in load_masks(Path("run/masks.safetensors")))
    assert counted == sum(linear["pruned"] for block in results["blocks"] for linear in block["linears"].values())
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "recovery_step"]
    assert [step["step"] for step in steps] == list(range(8))
    assert min(step["held_out"] for step in steps if step["held_out"] is not None) >= recovery["loss"]["after"]
    assert not Path("run/recovery").exists()
    card = Path("run/model/README.md").read_text()
    assert f"Recovery: {method}, 8 steps" in card.replace("\\", "")


@pytest.mark.parametrize("load", ["whole", "streamed"])
def test_a_run_shows_the_scores_of_the_model_before_it_was_tuned(
    load: str, tuned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (text,) = (word.partition("=")[2] for word in tuned if word.startswith("recovery.path="))
    scored = [
        f"model.load={load}",
        "evaluator=perplexity",
        f"evaluator.perplexity_sets=[{text}]",
        "evaluator.dense=true",
    ]
    untuned = [word for word in tuned if not word.startswith("recovery.")]
    assert main([*untuned, *scored, "hydra.run.dir=pruned"]) == 0
    capsys.readouterr()
    assert main([*tuned, *scored, "recovery=mezo", "recovery.lr=1e-3", "hydra.run.dir=tuned"]) == 0
    pruned, found = results_in(Path("pruned")), results_in(Path("tuned"))
    assert found["before"]["perplexity"] == pruned["perplexity"]
    assert found["dense"]["perplexity"] == pruned["dense"]["perplexity"]
    before, after = (values["perplexity"][text] for values in (found["before"], found))
    assert after != before
    heads, _, cells = (line.split("|")[1:-1] for line in capsys.readouterr().out.split("| measure")[1].splitlines()[:3])
    assert [head.strip() for head in heads] == ["dense", "before", "tuned", "change"]
    assert cells[-1].strip() == f"{after / before - 1:+.2%}"


def test_the_weights_move_as_the_method_says(tuned: list[str]) -> None:
    for method in ("null", "full", "norms"):
        chosen = [] if method == "null" else [f"recovery={method}"]
        arguments = [word for word in tuned if chosen or not word.startswith("recovery.")]
        assert main([*arguments, *chosen, f"hydra.run.dir=of_{method}"]) == 0
    pruned, full, norms = (weights_in(Path(name)) for name in ("of_null", "of_full", "of_norms"))
    moved = {name: not torch.equal(pruned[name], full[name]) for name in pruned}
    assert all(moved.values()), moved
    assert {name for name in pruned if not torch.equal(pruned[name], norms[name])} == {
        name for name, weight in pruned.items() if weight.dim() == 1
    }


def test_linears_that_are_kept_dense_are_tuned_too(tuned: list[str]) -> None:
    assert main([*tuned, "recovery=full", "ignore=[*.mlp.down_proj]", "hydra.run.dir=run"]) == 0
    masks = load_masks(Path("run/masks.safetensors"))
    assert masks
    assert not [name for name in masks if "down_proj" in name]
    assert_zeros_are_the_masks(Path("run"))


def test_2_of_4_stays_2_of_4(tuned: list[str]) -> None:
    assert main([*tuned, "recovery=full", "pattern='2:4'", "hydra.run.dir=run"]) == 0
    for name, keep_mask in load_masks(Path("run/masks.safetensors")).items():
        zeros = (weights_in(Path("run"))[name].view(-1, 4) == 0).sum(dim=1)
        assert (zeros == 2).all(), name
        assert (keep_mask.view(-1, 4).sum(dim=1) == 2).all()


def test_a_killed_recovery_goes_on_to_the_same_bytes(tuned: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [*tuned, "recovery=full", "recovery.steps=40", "recovery.checks=20"]
    unbroken, folder = Path("unbroken"), Path("killed")
    assert main([*arguments, f"hydra.run.dir={unbroken}"]) == 0
    seen = killed(arguments, folder, [{"recovery": 3}, {"recovery": 6}])
    assert len(seen) == 2
    kept = [json.loads(file.read_text()) for file in (folder / "recovery").glob("state-?.json")]
    points = max(kept, key=lambda state: state["number"])["record"]["points"]
    assert points
    assert not (folder / "results.json").exists()
    assert main([*arguments, f"hydra.run.dir={folder}"]) == 0
    assert (folder / "model/model.safetensors").read_bytes() == (unbroken / "model/model.safetensors").read_bytes()
    assert results_in(folder)["recovery"] == results_in(unbroken)["recovery"]
    courses = [
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (folder, unbroken)
    ]
    killed_course, whole = (
        [(line["step"], line["loss"], line["held_out"]) for line in course if line["kind"] == "recovery_step"]
        for course in courses
    )
    assert killed_course == whole
    seconds = [line["seconds"] for line in courses[0] if line["kind"] == "recovery_step"]
    assert seconds[: len(points)] == [point["seconds"] for point in points], "steps before the kill were taken again"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["recovery=sparsegrad"], "none of the 50% zeros"),
        (["recovery=full", "model.load=streamed"], "model.load=whole"),
        (["recovery=full", "recovery.lr=-1"], "recovery.lr=-1"),
        (["recovery=full", "recovery.distill=some"], "none, logits, squarehead"),
        (["recovery=mezo", "recovery.clip=1.0"], "clips no gradient"),
        (["recovery=mezo", "recovery.distill=squarehead"], "use logits"),
        (["recovery=full", "recovery.path=gone.txt"], "recovery.path=gone.txt"),
        (["recovery=full", "recovery.seq_len=64"], "model's context"),
        (["recovery=ful"], "full"),
        (["recovery=full", "recovery.rank=4"], "recovery.rank: no such key"),
        (["recovery=full", "pruner=wanda_then_quantise"], "recovery=norms"),
        (["recovery=full", "recovery.distill=squarehead", "structure=shortgpt"], "this model has lost blocks"),
        (["recovery=blocks", "structure=shortgpt"], "this model has lost blocks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_read(
    asked: list[str], told: str, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", *given, *asked, "hydra.run.dir=run"]) == 2
    assert told in capsys.readouterr().err
    assert not Path("run").exists()


def test_too_little_text_is_told_before_anything_is_pruned(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", *given, "recovery=norms", "recovery.steps=2", "hydra.run.dir=run"]) != 0
    assert "more text or a smaller recovery.seq_len" in capsys.readouterr().err
    assert not list(Path("run").glob("blocks/*.safetensors"))


def test_a_streamed_model_is_tuned_by_mezo_to_the_weights_of_one_in_memory(tuned: list[str]) -> None:
    found = []
    for load in ("whole", "streamed"):
        asked = [*tuned, "recovery=mezo", "recovery.eps=0.01", f"model.load={load}", f"hydra.run.dir={load}"]
        assert main(asked) == 0
        files = sorted((Path(load) / "model").glob("*.safetensors"))
        found.append({name: tensor for file in files for name, tensor in load_file(file).items()})
    whole, streamed = (results_in(Path(load))["recovery"] for load in ("whole", "streamed"))
    assert streamed == whole
    assert whole["best_step"] > 0
    assert found[0].keys() == found[1].keys()
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name]), name
    assert not Path("streamed/recovery").exists()


def test_exchanged_zeros_stay_as_many_and_the_saved_masks_are_the_new_ones(tuned: list[str]) -> None:
    course = ["recovery.reselect=4", "recovery.gather=2", "recovery.density=0.2", "recovery.checks=8"]
    for exchange in ("false", "true"):
        asked = [*tuned, "recovery=spiel", *course, f"recovery.exchange={exchange}", f"hydra.run.dir={exchange}"]
        assert main(asked) == 0
        assert_zeros_are_the_masks(Path(exchange))
    before, after = (load_masks(Path(f"{exchange}/masks.safetensors")) for exchange in ("false", "true"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name, mask in before.items():
        assert int(mask.sum()) == int(after[name].sum()), name
