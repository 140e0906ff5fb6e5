"""`besa evaluate`: any checkpoint, its scores joined to those that are there, and nothing replaced in silence. End to
end because they are joined to what a whole run left."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from besa_exp.cli.evaluate import read_asked
from besa_exp.cli.main import main
from besa_exp.cli.prune import composed
from besa_exp.errors import ConfigurationError
from besa_exp.runs.evaluate import evaluate_checkpoint

Answer = tuple[int, str]
Ask = Callable[..., Answer]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs `besa evaluate` on a CPU, by default on no set and no task; its exit code and all it printed."""

    def run(*arguments: str) -> Answer:
        code = main(["evaluate", "device=cpu", "evaluator=none", *arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out + said.err

    return run


def token_file(path: Path, seed: int = 1, length: int = 16) -> Path:
    """Windows of exact ids for the model of 64 tokens."""
    save_file({"input_ids": torch.randint(0, 64, (3, length), generator=torch.Generator().manual_seed(seed))}, path)
    return path


@pytest.fixture
def run(given: list[str], tmp_path: Path) -> Path:
    """A finished run by magnitude, half of the weights zero, scored on one token file."""
    sets = f"evaluator.perplexity_sets=[{token_file(tmp_path / 'first.safetensors')}]"
    assert main(["prune", *given, sets, "hydra.run.dir=run"]) == 0
    return Path("run")


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def literal_perplexity(model: Path, tokens: Path) -> float:
    """exp of the mean of -log p(token | those before it), in fp64."""
    ids = load_file(tokens)["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(input_ids=ids).logits.double()
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    return math.exp(-float(chosen.mean()))


@pytest.mark.parametrize("named", ["run", "run/model"])
def test_new_scores_of_a_run_join_its_results(run: Path, ask: Ask, tmp_path: Path, named: str) -> None:
    second, before = token_file(tmp_path / "second.safetensors", 2), results_in(run)
    code, said = ask(f"checkpoint={named}", f"evaluator.perplexity_sets=[{tmp_path / 'first.safetensors'},{second}]")
    assert code == 0
    assert "first.safetensors: already scored" in said
    after = results_in(run)
    assert set(after["perplexity"]) == {*before["perplexity"], str(second)}
    assert after["perplexity"][str(second)] == pytest.approx(literal_perplexity(run / "model", second), rel=1e-6)
    unchanged = set(before) - {"perplexity", "provenance"}
    assert {key: after[key] for key in unchanged} == {key: before[key] for key in unchanged}
    assert after["provenance"]["perplexity"][str(second)]["num_windows"] == 3
    assert [entry["scored"] for entry in after["evaluations"]] == [[str(second)]]
    assert "| perplexity second.safetensors |" in (run / "model" / "README.md").read_text()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["perplexity"] == {
        str(second): after["perplexity"][str(second)]
    }


def test_what_is_scored_is_told_and_left_alone_before_a_model_is_loaded(run: Path, ask: Ask, tmp_path: Path) -> None:
    before = (run / "results.json").read_bytes()
    code, said = ask("checkpoint=run", f"evaluator.perplexity_sets=[{tmp_path / 'first.safetensors'}]")
    assert code == 0
    assert "first.safetensors: already scored" in said
    assert "finished before: 50.00 % zeros" in said
    assert "loading" not in said
    assert (run / "results.json").read_bytes() == before


def test_a_score_on_other_tokens_is_refused_and_replaced_only_when_asked(run: Path, ask: Ask, tmp_path: Path) -> None:
    name, before = str(tmp_path / "first.safetensors"), results_in(run)
    token_file(tmp_path / "first.safetensors", seed=9)
    code, said = ask("checkpoint=run", f"evaluator.perplexity_sets=[{name}]")
    assert code == 2
    assert f"run holds scores of other inputs: evaluator.perplexity_sets={name} has changed" in said
    assert "score it again with overwrite=true" in said
    assert results_in(run) == before
    code, said = ask("checkpoint=run", f"evaluator.perplexity_sets=[{name}]", "overwrite=true")
    assert code == 0
    assert "WARNING" in said
    assert f"{before['perplexity'][name]} is replaced by" in said
    assert before["provenance"]["perplexity"][name]["tokens_sha256"] in said
    after = results_in(run)
    assert after["perplexity"][name] == pytest.approx(literal_perplexity(run / "model", Path(name)), rel=1e-6)
    (replaced,) = after["provenance"]["replaced"]
    assert replaced["value"] == before["perplexity"][name]
    assert replaced["record"] == before["provenance"]["perplexity"][name]


def test_a_run_that_kept_masks_alone_names_the_command_that_rebuilds_its_model(
    run: Path, ask: Ask, model_dir: Path
) -> None:
    shutil.rmtree(run / "model")
    code, said = ask("checkpoint=run")
    assert code == 2
    assert f"besa masks apply run/masks.safetensors --model {model_dir} --out run/model" in said
    assert "save.model=true" in said


def test_a_run_that_is_not_finished_is_refused(run: Path, ask: Ask) -> None:
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"status": "failed"}))
    code, said = ask("checkpoint=run")
    assert code == 2
    assert "its run is not finished (status.json says failed)" in said


def test_scores_do_not_join_the_results_of_another_model(run: Path, ask: Ask, model_dir: Path, tmp_path: Path) -> None:
    shutil.copyfile(model_dir / "model.safetensors", run / "model" / "model.safetensors")
    sets = f"evaluator.perplexity_sets=[{token_file(tmp_path / 'second.safetensors')}]"
    code, said = ask("checkpoint=run", sets)
    assert code == 2
    assert "run holds scores of another model: checkpoint=run has changed (model.safetensors: " in said
    assert "name another folder with hydra.run.dir=" in said
    (run / "inputs.json").unlink()  # as where it was written by an earlier version
    code, said = ask("checkpoint=run", sets)
    assert code == 2
    assert "it is not the model that the run made" in said


@pytest.mark.parametrize("asked", [[], ["overwrite=true"]])
def test_a_runs_scores_are_not_shown_for_a_model_tuned_in_its_place(
    run: Path, ask: Ask, tmp_path: Path, asked: list[str]
) -> None:
    saved = run / "model" / "model.safetensors"
    save_file({name: 1.5 * weight for name, weight in load_file(saved).items()}, saved, {"format": "pt"})
    given = ["checkpoint=run", f"evaluator.perplexity_sets=[{tmp_path / 'first.safetensors'}]", *asked]
    code, said = ask(*given)
    assert code == 2  # the zeros are the same, the weights are not
    assert "run holds scores of another model: checkpoint=run has changed (model.safetensors: " in said
    assert ask(*given, "hydra.run.dir=tuned")[0] == 0
    (then,), (now,) = (results_in(folder)["perplexity"].values() for folder in (run, Path("tuned")))
    assert then != now


def test_any_folder_is_scored_into_results_of_its_own_that_later_scores_join(
    ask: Ask, given: list[str], model_dir: Path, tmp_path: Path
) -> None:
    first, second = token_file(tmp_path / "a.safetensors", 1), token_file(tmp_path / "b.safetensors", 2)
    assert ask(f"checkpoint={model_dir}", f"evaluator.perplexity_sets=[{first}]")[0] == 0
    assert ask(f"checkpoint={model_dir}", f"evaluator.perplexity_sets=[{second}]")[0] == 0
    (folder,) = Path("outputs").iterdir()
    results = results_in(folder)
    assert set(results["perplexity"]) == {str(first), str(second)}
    assert results["perplexity"][str(first)] == pytest.approx(literal_perplexity(model_dir, first), rel=1e-6)
    assert results["measured_sparsity"] == 0.0
    assert results["linears"] == 14
    assert not any(model_dir.glob("results*"))


def test_the_zeros_of_the_linears_are_counted_in_the_files(
    ask: Ask, given: list[str], model_dir: Path, tmp_path: Path
) -> None:
    sparse = shutil.copytree(model_dir, tmp_path / "sparse")
    weights = load_file(sparse / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][:3] = 0
    weights["model.embed_tokens.weight"][:] = 0  # outside the blocks: not counted
    save_file(weights, sparse / "model.safetensors", {"format": "pt"})
    code, said = ask(f"checkpoint={sparse}", "hydra.run.dir=scores")
    assert code == 0
    results = results_in(Path("scores"))
    counted = results["blocks"][1]["linears"]["mlp.up_proj"]
    assert counted == {"weights": 12 * 16, "pruned": 48, "sparsity": 0.25}
    total = sum(linear["weights"] for block in results["blocks"] for linear in block["linears"].values())
    assert results["measured_sparsity"] == 48 / total
    assert f"done: {100 * 48 / total:.2f} % zeros" in said


def test_scores_of_files_that_have_changed_are_not_mixed(
    ask: Ask, given: list[str], model_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(model_dir, tmp_path / "changing")
    first, second = token_file(tmp_path / "a.safetensors", 1), token_file(tmp_path / "b.safetensors", 2)
    assert ask(f"checkpoint={model}", f"evaluator.perplexity_sets=[{first}]")[0] == 0
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    code, said = ask(f"checkpoint={model}", f"evaluator.perplexity_sets=[{second}]")
    assert code == 2
    assert f"holds scores of other inputs: checkpoint={model} has changed" in said
    code, said = ask(f"checkpoint={model}", f"evaluator.perplexity_sets=[{second}]", "overwrite=true")
    assert code == 0
    assert "its earlier scores are dropped" in said
    (folder,) = Path("outputs").iterdir()
    assert set(results_in(folder)["perplexity"]) == {str(second)}


def test_scores_in_another_dtype_are_not_taken_for_those_asked_for(ask: Ask, model_dir: Path, tmp_path: Path) -> None:
    given = [f"checkpoint={model_dir}", f"evaluator.perplexity_sets=[{token_file(tmp_path / 'a.safetensors')}]"]
    given += ["tracker=none", f"hydra.run.dir={tmp_path / 'scores'}"]
    code, said = ask(*given, "model.dtype=float32")
    assert code == 0, said
    code, said = ask(*given, "model.dtype=bfloat16")
    assert code == 2
    assert f"model.dtype=bfloat16: {tmp_path / 'scores'} holds scores of the model in float32" in said
    assert ask(*given, "model.dtype=float32")[1].startswith("perplexity on")  # known
    assert ask(*given, "model.dtype=bfloat16", "overwrite=true")[0] == 0


def test_a_runs_model_is_scored_in_another_dtype_in_a_folder_of_its_own(run: Path, ask: Ask, tmp_path: Path) -> None:
    given = [f"checkpoint={run}", "device=cpu", "evaluator=none", "model.dtype=bfloat16"]
    given.append(f"evaluator.perplexity_sets=[{token_file(tmp_path / 'a.safetensors')}]")
    before = results_in(run)
    code, said = ask(*given)
    assert code == 2
    assert "as saved, float32; leave model.dtype out, or name another folder with hydra.run.dir=" in said
    assert ask(*given, "hydra.run.dir=scores")[0] == 0
    assert results_in(run) == before
    assert results_in(Path("scores"))["measured_sparsity"] == before["measured_sparsity"]


def test_scores_that_another_command_adds_while_the_model_loads_are_not_replaced(
    ask: Ask, given: list[str], model_dir: Path, tmp_path: Path
) -> None:
    tokens = token_file(tmp_path / "a.safetensors", 1)
    words = [f"checkpoint={model_dir}", "device=cpu", "evaluator=none", f"evaluator.perplexity_sets=[{tokens}]"]
    asked = composed("besa evaluate", "evaluate", words, read_asked)
    assert ask(*words)[0] == 0
    before = results_in(asked.folder)
    token_file(tokens, 2)
    with pytest.raises(ConfigurationError, match="the file has changed since"):
        evaluate_checkpoint(asked.settings, asked.folder, asked.config)
    assert results_in(asked.folder) == before


def test_all_problems_are_told_at_once_and_nothing_is_written(ask: Ask, given: list[str]) -> None:
    code, said = ask("evaluator.limit=x", "evaluator.tasks=[piqaa]", "sparsity=0.5", "device=gpu", "model.dtype=float8")
    assert code == 2
    assert "6 problems" in said
    for told in (
        "checkpoint: no value given",
        "evaluator.limit=x: must be a whole number",
        "did you mean piqa or ",
        "sparsity: no such key",
        "device=gpu: must be auto",
        "model.dtype=float8: must be one of",
    ):
        assert told in said
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["checkpoint=/no/such/model"], "checkpoint=/no/such/model: there is no such folder"),
        (["checkpoint=embedded,other"], "one command scores one checkpoint"),
        (["-m", "checkpoint=embedded"], "-m: one command scores one checkpoint"),
        (["model=embeded"], "did you mean embedded?"),
    ],
)
def test_a_bad_argument_is_refused(ask: Ask, given: list[str], arguments: list[str], told: str) -> None:
    code, said = ask(*arguments)
    assert code == 2
    assert told in said
    assert "1 problem," in said
    assert list(Path.cwd().iterdir()) == []


def test_the_dense_model_is_compared_with_what_is_published(
    ask: Ask, given: list[str], model_dir: Path, tmp_path: Path
) -> None:
    tokens = token_file(tmp_path / "a.safetensors", length=24)
    true = literal_perplexity(model_dir, tokens)
    sets = f"evaluator.perplexity_sets=[{tokens}]"
    told = {}
    for name, value in (("near", 0.995 * true), ("far", 0.98 * true)):
        published = f"+model.published_perplexity={{{tokens}: {{24: {value}, 16: 1.0}}}}"
        code, told[name] = ask(f"checkpoint={model_dir}", sets, published, f"hydra.run.dir={name}")
        assert code == 0
        compared = results_in(Path(name))["published"][str(tokens)]
        assert compared["published"] == pytest.approx(value)
        assert compared["agrees"] is (name == "near")
        assert compared["difference"] == pytest.approx(true / value - 1, rel=1e-5)
    assert "is published" not in told["near"]
    assert "is published (windows of 24 tokens, +2.0 %)" in told["far"]


def test_a_run_that_scores_the_dense_model_compares_it_with_what_is_published(
    given: list[str], model_dir: Path, tmp_path: Path
) -> None:
    tokens = token_file(tmp_path / "a.safetensors")
    true = literal_perplexity(model_dir, tokens)
    chosen = ["evaluator.dense=true", f"evaluator.perplexity_sets=[{tokens}]", "hydra.run.dir=run"]
    published = f"+model.published_perplexity={{{tokens}: {{16: {true / 1.5}}}}}"
    assert main(["prune", *given, *chosen, published]) == 0
    (compared,) = results_in(Path("run"))["published"].values()
    assert compared["difference"] == pytest.approx(0.5, rel=1e-4)
    assert compared["measured"] == results_in(Path("run"))["dense"]["perplexity"][str(tokens)]
    assert (Path("run") / "run.log").read_text().count("is published (windows of 16 tokens, +50.0 %)") == 1


def test_the_configuration_of_an_evaluation_is_shown_like_that_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--cfg", "job", "model=llama2_7b"]) == 0
    assert "checkpoint: ${model.path}" in capsys.readouterr().out


def test_an_empty_checkpoint_is_not_to_be_left_out(ask: Ask) -> None:
    assert ask("checkpoint=") == (
        2,
        "besa evaluate: 1 problem, nothing was done\n  - checkpoint=: is empty; give a text\n",
    )
