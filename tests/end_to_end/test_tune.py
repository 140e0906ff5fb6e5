"""`besa tune`: any folder is tuned under its own zeros, into a run folder of its own. End to end because the folders
are those that other commands left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import killed
from safetensors.torch import load_file, save_file

from besa_exp.cli.main import main
from besa_exp.report.runs import read_run

Ask = Callable[..., tuple[int, str]]


def prune(model_dir: Path, folder: Path, *more: str) -> Path:
    """A finished run by magnitude, half of the weights zero."""
    save_file({"input_ids": torch.randint(0, 64, (4, 16))}, folder / "tokens.safetensors")
    asked = [f"model.path={model_dir}", f"calibration.path={folder / 'tokens.safetensors'}", "pruner=magnitude", *more]
    asked += ["evaluator=none", "tracker=none", "device=cpu", "model.dtype=float32", "save.verify=false"]
    assert main(["prune", *asked, f"hydra.run.dir={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def finished(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be copied, not changed."""
    return prune(model_dir, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def pruned(finished: Path, given: list[str]) -> Path:
    """A copy of it in the working folder."""
    return shutil.copytree(finished, Path("run"))


@pytest.fixture
def words(tmp_path: Path, given: list[str]) -> list[str]:
    """A tuning for some steps on tokens that follow a rule, and a score on others of them; `given` has left the working
    folder empty."""
    save_file({"input_ids": torch.arange(60 * 16).view(60, 16) % 7}, tmp_path / "rule.safetensors")
    save_file({"input_ids": torch.arange(3, 3 + 4 * 16).view(4, 16) % 7}, tmp_path / "scored.safetensors")
    text = [f"calibration.path={tmp_path / 'rule.safetensors'}", "recovery.held_out=4", "recovery.batch_size=4"]
    scored = ["evaluator=perplexity", f"evaluator.perplexity_sets=[{tmp_path / 'scored.safetensors'}]"]
    course = ["recovery.steps=8", "recovery.checks=4", "recovery.lr=0.01", "hydra.run.dir=tuned"]
    return ["tune", "device=cpu", "save.verify=false", *text, *scored, *course]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], words: list[str]) -> Ask:
    """Runs `besa tune`; its exit code and all it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        code = main([*words, *arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out + said.err

    return run


def results_in(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "results.json").read_text())


def test_a_run_is_tuned_under_its_zeros_and_scored_before_and_after(pruned: Path, ask: Ask) -> None:
    card = Path("run/model/README.md")
    card.write_text(card.read_text().replace("---\n", "---\nbase_model: org/tiny\n", 1))
    code, said = ask("checkpoint=run")
    assert code == 0
    assert "- Base model: [org/tiny](" in Path("tuned/model/README.md").read_text()  # as the run knew it
    results, before = results_in("tuned"), load_file("run/model/model.safetensors")
    (earlier,), (later,) = results["before"]["perplexity"].values(), results["perplexity"].values()
    assert later < earlier / 2
    assert f"{earlier:.4f} -> {later:.4f}" in said
    assert "model before tuning: perplexity on" in said
    heads, _, shown = (line.split("|")[2:-1] for line in said[said.index("| measure") :].splitlines()[:3])
    assert [head.strip() for head in heads] == ["before", "tuned", "change"]
    assert [cell.strip() for cell in shown] == [f"{earlier:.4f}", f"{later:.4f}", f"{later / earlier - 1:+.2%}"]
    assert "reconstruction loss" not in said  # none was measured
    assert {tuple(block["reconstruction_loss"].values()) for block in results["blocks"]} == {(None, None)}
    assert "| measure | before | tuned |" in " ".join(Path("tuned/model/README.md").read_text().split())
    assert results["pruner"] == "magnitude+full"
    assert results["model"] == results_in("run")["model"]
    assert results["calibration"] == results_in("run")["calibration"]  # by it the two are comparable
    assert results["measured_sparsity"] == results["target_sparsity"] == results_in("run")["measured_sparsity"]
    after = load_file("tuned/model/model.safetensors")
    zeros = {name: weight == 0 for name, weight in before.items() if "proj" in name}
    assert sum(int(mask.sum()) for mask in zeros.values()) > 1000
    for name, mask in zeros.items():
        assert torch.equal(after[name] == 0, mask)
        assert not torch.signbit(after[name][mask]).any()
        assert not torch.equal(after[name], before[name])
    assert (Path("run/model/model.safetensors")).is_file()
    code, said = ask("checkpoint=run")
    assert code == 0
    assert "finished before" in said
    code, said = ask("checkpoint=run", "recovery.seed=7")
    assert (code, "(recovery.seed: 0 before, 7 now)" in said) == (2, True), said


def test_the_pattern_of_the_run_stays(given: list[str], ask: Ask) -> None:
    assert main(["prune", *given, "pattern='2:4'", "hydra.run.dir=run"]) == 0
    assert ask("checkpoint=run")[0] == 0
    assert results_in("tuned")["pattern"] == "2:4"
    for name, weight in load_file("tuned/model/model.safetensors").items():
        assert "proj" not in name or ((weight.view(-1, 4) == 0).sum(dim=1) == 2).all()


def test_reports_tell_tunings_of_one_method_with_other_settings_apart(
    model_dir: Path, pruned: Path, tmp_path: Path, ask: Ask
) -> None:
    other = prune(model_dir, tmp_path, "pruner.granularity=row")
    for checkpoint, folder in ((pruned, "tuned"), (other, "tuned_other"), (Path("tuned_other"), "tuned_again")):
        assert ask(f"checkpoint={checkpoint}", f"hydra.run.dir={folder}")[0] == 0
    labels = [read_run(Path(folder)).method.label for folder in ("tuned", "tuned_other", "tuned_again")]
    assert ["granularity=row" in label for label in labels] == [False, True, True]


def test_a_plain_folder_and_a_tuned_one_are_tuned_too(pruned: Path, ask: Ask) -> None:
    shutil.copytree("run/model", "plain")
    assert ask("checkpoint=plain", "recovery=norms")[0] == 0
    assert results_in("tuned")["pruner"] == "checkpoint+norms"
    assert ask("checkpoint=tuned", "recovery=lora", "hydra.run.dir=again")[0] == 0
    assert results_in("again")["pruner"] == "checkpoint+norms+lora"


def test_states_that_are_followed_are_those_of_the_model_that_was_pruned(
    pruned: Path, model_dir: Path, ask: Ask
) -> None:
    """Blocks that followed the pruned model itself would have no error, and nothing to learn."""
    assert ask("checkpoint=run", "recovery=blocks")[0] == 0
    lines = [json.loads(line) for line in Path("tuned/metrics.jsonl").read_text().splitlines()]
    assert next(line["loss"] for line in lines if line["kind"] == "recovery_step") > 0.01
    shutil.copytree("run/model", "plain")
    code, said = ask("checkpoint=plain", "recovery=full", "recovery.distill=logits", "hydra.run.dir=again")
    assert code == 2
    assert "teacher=DENSE" in said
    named = ("checkpoint=plain", f"teacher={model_dir}", "recovery.steps=2", "recovery.checks=1")
    assert ask(*named, "recovery=full", "recovery.distill=logits", "hydra.run.dir=again")[0] == 0


def test_a_checkpoint_that_is_streamed_is_tuned_by_mezo(pruned: Path, ask: Ask) -> None:
    found = []
    for load in ("whole", "streamed"):
        assert ask("checkpoint=run", "recovery=mezo", f"model.load={load}", f"hydra.run.dir={load}")[0] == 0
        files = Path(load).glob("model/*.safetensors")
        found.append({name: tensor for file in files for name, tensor in load_file(file).items()})
    assert results_in("streamed")["recovery"] == results_in("whole")["recovery"]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


def test_a_dense_model_is_tuned_on_request_alone(model_dir: Path, ask: Ask) -> None:
    code, said = ask(f"checkpoint={model_dir}", "recovery=sparsegrad", "recovery.gather=2")
    assert code == 2
    assert "dense=true" in said
    assert not Path("tuned/results.json").exists()
    assert ask(f"checkpoint={model_dir}", "recovery=sparsegrad", "recovery.gather=2", "dense=true")[0] == 0
    assert results_in("tuned")["recovery"]["loss"]["after"] < results_in("tuned")["recovery"]["loss"]["before"]


def test_a_killed_tuning_goes_on_to_the_same_bytes(pruned: Path, words: list[str]) -> None:
    arguments = [*words[:-1], "checkpoint=run", "recovery.steps=40", "recovery.checks=20"]
    assert main([*arguments, "hydra.run.dir=unbroken"]) == 0
    assert len(killed(arguments, Path("killed"), [{"recovery": 4}])) == 1
    assert not Path("killed/results.json").exists()
    assert main([*arguments, "hydra.run.dir=killed"]) == 0
    one, other = (Path(folder) / "model/model.safetensors" for folder in ("killed", "unbroken"))
    assert one.read_bytes() == other.read_bytes()
    assert results_in("killed")["recovery"] == results_in("unbroken")["recovery"]
    assert results_in("killed")["perplexity"] == results_in("unbroken")["perplexity"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["checkpoint=gone"], "checkpoint=gone"),
        ([], "checkpoint: no value given"),
        (["checkpoint=run", "recovery=sparsegrad", "recovery.gather=2"], "zeros of this model would stay"),
        (["checkpoint=run", "model.load=streamed"], "model.load=whole"),
        (["checkpoint=run", "recovery.steps=0"], "recovery.steps=0"),
        (["checkpoint=run", "recovery=none"], "recovery=none: no such preset"),
        (["checkpoint=run/model", "recovery=blocks", "teacher=gone"], "teacher=gone"),
        (["checkpoint=run", "recovery=full,lora"], "one command tunes one checkpoint"),
        (["checkpoint=run", "hydra.run.dir=run"], "name another folder"),
        (["checkpoint=run", "hydra.run.dir=${gone}"], "the run folder's name cannot be made"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_tuned_is_refused(asked: list[str], told: str, pruned: Path, ask: Ask) -> None:
    before = (pruned / "model/model.safetensors").read_bytes()
    code, said = ask(*asked)
    assert code == 2
    assert told in said
    assert (pruned / "model/model.safetensors").read_bytes() == before
    assert not Path("tuned/results.json").exists()
