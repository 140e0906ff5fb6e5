"""What the command line answers to requests that cannot be carried out: exit code 2, one readable message with what,
where, the rule and the remedy, no traceback, and nothing left behind. End to end because every layer refuses something
and what is left behind is seen in the working folder alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from besa_exp.cli.main import main
from besa_exp.run_folder.folder import RunFolder

Refusal = Callable[..., str]


@pytest.fixture
def refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Runs `besa prune` with more arguments, checks how it was refused and returns what was said."""

    def run(*arguments: str) -> str:
        code = main(["prune", *given, *arguments])
        said = capsys.readouterr()
        assert code == 2
        assert "Traceback" not in said.err
        assert "nothing was done" in said.err
        assert list(Path.cwd().iterdir()) == [], "something was left behind"
        return said.err

    return run


BAD: dict[str, dict[str, list[str]]] = {  # what is asked at once, and what each argument is told in a line of its own
    "names": {
        "pruner=wandaa": ["pruner=wandaa: no such preset (did you mean wanda?)", "sparsegpt"],
        "experiment=comparison": ["no such preset (did you mean compare?)"],
        "hydra/launcher=jobib": ["no such preset (did you mean joblib?)"],
        "sparcity=0.5": ["sparcity: no such key (did you mean sparsity?)"],
        "calibration.num_sample=4": ["did you mean calibration.num_samples?", "seq_len"],
        "num_samples=4": ["num_samples: no such key (did you mean calibration.num_samples?)"],
        "budget=null": ["budget=null: no such preset", "uniform"],
        "budgt=owl": ["budgt: no such key (did you mean budget?)", "experiment"],
        "hydra.run.dri=x": ["did you mean hydra.run.dir?"],
        "wanda": ["arguments are written key=value (did you mean pruner=wanda?)"],
        "seed=[1": ["seed=[1: [ in a value", "quote"],
    },
    "no values": {
        "pruner.damping=1": ["pruner.damping: no such key"],
        "sparsity=abc": ["sparsity=abc: must be a finite number", "sparsity=0.5"],
        "pattern=2:x": ["pattern=2:x: must be 'unstructured' or 'N:M'", "pattern=2:4"],
        "seed=1.5": ["seed=1.5: must be a whole number"],
        "deterministic=maybe": ["deterministic=maybe: must be true or false"],
        "model=local": ["model.path: no value given", "add model.path=..."],
        "model.dtype=float8": ["model.dtype=float8: must be one of auto, float32, bfloat16, float16"],
        "calibration.num_samples=0": ["calibration.num_samples=0: must be at least 1"],
        "device=gpu": ["device=gpu: must be auto, cpu, cuda or cuda:N"],
        "tracker.mode=onlin": ["tracker.mode=onlin: must be one of offline, online, disabled (did you mean online?)"],
    },
    "values": {
        "sparsity=nan": ["sparsity=nan: must be a finite number"],
        "pattern=4:4": ["0 < N < M"],
        "seed=-1": ["seed=-1: must be in [0, 4294967295]"],
        "model.path=/no/such/model": ["model.path=/no/such/model: there is no such folder", "check the path"],
        "calibration.path=/no/text.txt": ["/no/text.txt"],
        "evaluator.perplexity_sets=[wikitex2]": ["wikitex2", "did you mean wikitext2?"],
        "evaluator.tasks=[piqaa]": ["piqaa", "did you mean piqa"],
        "device=cuda:99": ["device=cuda:99", "device=auto"],
    },
    "of the model": {
        "sparsity=1": ["sparsity=1: must be in [0, 1)", "sparsity=0.5"],
        "pattern=3:8": ["the inputs of a linear must be divisible by 8", "mlp.down_proj (12)", "unstructured"],
    },
    "below": {"sparsity=-0.1": ["sparsity=-0.1: must be in [0, 1)"]},
    "above": {"sparsity=50": ["sparsity=50: must be in [0, 1)"]},
    "several": {"sparsity=0.1,0.2": ["several values; add -m"]},
}


@pytest.mark.parametrize("asked", BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_each_with_its_rule_and_remedy(asked: dict[str, list[str]], refused: Refusal) -> None:
    said = refused(*(["model.path=???"] if "model=local" in asked else []), *asked)
    problems = [line for line in said.splitlines() if line.startswith("  - ")]
    for argument, told in asked.items():
        assert any(all(fragment in problem for fragment in told) for problem in problems), (argument, said)


def test_a_key_that_one_preset_of_a_sweep_lacks_is_told_with_that_preset(refused: Refusal) -> None:
    said = refused("-m", "pruner=besa,wanda", "pruner.epochs=3")
    assert said.count("no such key") == 1
    assert "keys of pruner=wanda: importance, granularity; sweep the presets of pruner that have it in a" in said


def test_a_pattern_that_the_pruner_cannot_make_is_refused(refused: Refusal) -> None:
    assert "pattern=unstructured" in refused("pruner=besa_paper", "pattern=2:4")


def test_an_n_that_rows_choose_needs_a_method_that_chooses_and_divisible_inputs(refused: Refusal) -> None:
    assert "wanda does not choose N" in (said := refused("pruner=wanda", "pattern=N:4", "sparsity=0.6"))
    assert "leave sparsity out" not in said
    assert "the inputs of a linear must be divisible by 8" in refused("pruner=besa", "pattern=N:8", "sparsity=0.6")


def test_a_sparsity_that_the_pattern_contradicts_is_refused(refused: Refusal) -> None:
    assert "the pattern makes it 0.5; leave sparsity out" in refused("pattern=2:4", "sparsity=0.7")


def test_windows_that_a_token_file_does_not_have_are_refused(refused: Refusal, given: list[str]) -> None:
    said = refused("calibration.num_samples=2", "calibration.seq_len=8", "sparsity=2")
    file = given[1].partition("=")[2]
    assert f"calibration.num_samples=2: {file} has 4 windows of 16 tokens, and a token file is taken as it is" in said
    assert f"calibration.seq_len=8: {file} has" in said
    said = refused("calibration.num_samples=4", "calibration.seq_len=16", "sparsity=2")  # as it is
    assert "1 problem" in said


def test_windows_beyond_the_context_are_refused(refused: Refusal, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words " * 99)
    local = [f"calibration.path={tmp_path / 'text.txt'}", "calibration.seq_len=33"]
    said = refused(*local, "evaluator=perplexity", "evaluator.perplexity_sets=[embedded]", "evaluator.seq_len=40")
    assert "a window of 33 tokens exceeds the model's context of 32" in said
    assert "evaluator.seq_len=40" in said


def test_windows_beyond_the_context_of_a_preset_are_refused_before_the_model_is_there(refused: Refusal) -> None:
    said = refused(
        "model=opt_125m", "model.path=facebook/opt-125m", "calibration.path=null", "calibration.seq_len=4096"
    )
    assert "a window of 4096 tokens exceeds the model's context of 2048" in said


def test_a_model_folder_without_config_is_refused(refused: Refusal, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json in it; give the folder that save_pretrained wrote" in refused(
        f"model.path={tmp_path / 'empty'}"
    )


def test_a_truncated_safetensors_is_refused(refused: Refusal, model_dir: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    said = refused(f"model.path={broken}")
    assert "model.safetensors" in said
    assert "it was cut off; copy or download it again" in said


def test_a_checkpoint_of_pickles_is_refused(refused: Refusal, model_dir: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(model_dir, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "only pickled weights (pytorch_model.bin)" in refused(f"model.path={pickled}")


def test_a_hub_model_that_is_not_in_the_cache_is_refused_offline(refused: Refusal) -> None:
    said = refused("model.path=no-such-owner/no-such-model", "offline=true")
    assert "offline=true, and not in the local caches: model no-such-owner/no-such-model; fetch what" in said
    assert "besa prefetch model.path=no-such-owner/no-such-model evaluator=none" in said


def test_a_tracker_that_needs_the_network_is_refused_offline(refused: Refusal) -> None:
    assert "set tracker.mode=offline" in refused("tracker=wandb", "tracker.mode=online", "offline=true")


def test_too_little_disk_is_refused(refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    said = refused()
    assert "1.0 MB are free" in said
    assert "save.model=false" in said


def test_a_run_folder_that_cannot_be_made_is_refused(refused: Refusal, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "name another folder with hydra.run.dir=" in refused(f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert "is where the model lies" in refused("model=local", f"model.path={tmp_path}", f"hydra.run.dir={tmp_path}/.")


def test_all_problems_are_told_at_once(refused: Refusal) -> None:
    bad = ["pruner=wandaa", "sparcity=1", "sparsity=2", "pattern=2:x", "seed=x", "device=cuda:99", "model.path=/nope"]
    said = refused(*bad, "calibration.seq_len=x", "evaluator.limit=x", "save.masks=3", "calibration.path=/no/such.txt")
    assert "11 problems" in said
    for what in (*bad[2:], "pruner=wandaa", "sparcity", "calibration.seq_len=x", "evaluator.limit=x", "save.masks=3"):
        assert what in said


def test_a_path_that_must_be_given_hides_no_other_problem(refused: Refusal) -> None:
    said = refused("calibration=local", "calibration.path=???", "calibration.num_samples=0", "device=gpu", "seed=x")
    assert "4 problems" in said
    for what in ("calibration.path: no value given", "calibration.num_samples=0", "device=gpu", "seed=x"):
        assert what in said
    said = refused("model=local", "model.path=???", "model.dtype=float8", "tracker.mode=foo")
    assert "3 problems" in said
    for what in ("model.path: no value given", "model.dtype=float8", "tracker.mode=foo: must be one of offline"):
        assert what in said


def test_a_calibration_set_that_is_not_in_the_cache_is_refused_offline(
    refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    asked = ["calibration=c4", "calibration.path=null", "calibration.seq_len=16"]
    said = refused(*asked, "offline=true")
    assert "1 problem" in said
    assert "calibration c4 (en/c4-train.00000-of-01024.json.gz of allenai/c4)" in said
    assert "seed=x" in (other := refused(*asked, "seed=x"))
    assert "1 problem" in other


def test_an_unknown_preset_brings_no_complaint_about_what_stands_in_for_it(refused: Refusal) -> None:
    said = refused("pruner=wandaa", "pruner.nonsense=1", "pattern=3:4")
    assert "1 problem" in said


def test_every_bad_job_of_a_sweep_is_told_before_any_starts(refused: Refusal) -> None:
    said = refused("-m", "sparsity=0.1,1.5,2.5", "pruner=wanda,magnitude")
    assert "2 problems" in said
    assert "sparsity=1.5" in said
    assert "sparsity=2.5" in said


def test_two_jobs_of_a_sweep_for_one_folder_are_refused(refused: Refusal) -> None:
    assert "two jobs of the sweep would share the folder" in refused("-m", "offline=true,false")


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prunne"]) == 2
    said = capsys.readouterr().err
    assert "prunne: no such command (did you mean prune?)" in said
    assert "commands: prune, " in said


def test_flags_that_show_the_configuration_refuse_it_as_well(refused: Refusal) -> None:
    assert "did you mean sparsity?" in refused("--cfg", "job", "sparcity=0.5")


def test_two_runs_in_one_folder_are_refused_and_the_first_is_left_alone(
    given: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with RunFolder.open(folder):
        before = (folder / "status.json").read_text()
        assert main(["prune", *given, f"hydra.run.dir={folder}"]) == 2
        assert (folder / "status.json").read_text() == before
    said = capsys.readouterr().err
    assert f"{folder} is in use by process {os.getpid()}" in said
    assert "hydra.run.dir=" in said


def test_text_without_a_tokenizer_is_refused_and_leaves_no_folder(refused: Refusal, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words " * 999)
    said = refused(f"calibration.path={tmp_path / 'text.txt'}", "calibration.seq_len=16")
    assert "the model has no tokenizer" in said


@pytest.fixture
def broken_model(model_dir: Path, tmp_path: Path) -> Path:
    """Sound to look at, but a weight of block 1 is not a number."""
    folder = shutil.copytree(model_dir, tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_failure_inside_a_run_exits_with_1_and_stays_told(
    given: list[str], broken_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", *given, f"model.path={broken_model}", "pruner=wanda"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (folder,) = Path("outputs").iterdir()
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "failed"
    assert status["error"].split(": ", 1)[1] in said
    assert str(folder / "run.log") in said
    assert "Traceback" in (folder / "run.log").read_text()


@pytest.mark.parametrize("load", ["whole", "streamed"])
def test_a_weight_outside_the_blocks_that_is_not_finite_is_named_although_no_sample_needs_it(
    load: str, given: list[str], model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    tokens = load_file(given[1].partition("=")[2])["input_ids"]
    unused = next(token for token in range(64) if token not in tokens)
    weights["model.embed_tokens.weight"][unused, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["prune", *given, f"model.path={folder}", f"model.load={load}"]) == 1
    said = capsys.readouterr()
    assert f"model.path={folder}: model.embed_tokens.weight holds NaN or infinity" in said.err
    assert "block 1 of" not in said.out


def test_folders_of_the_hubs_cache_are_answered_with_the_hub_id(refused: Refusal, tmp_path: Path) -> None:
    (tmp_path / "hub" / "models--org--name" / "snapshots" / "0123").mkdir(parents=True)
    assert "give the hub id org/name" in refused(f"model.path={tmp_path}/hub/models--org--name")
    assert "is a cache of the hub, not a model's folder; give a hub id, as org/name" in refused(
        f"model.path={tmp_path}/hub"
    )


def test_a_job_that_fails_stops_no_other_and_the_sweep_exits_with_1(
    given: list[str], broken_model: Path, model_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The other is done already: what a sweep does after one that was lost is seen in test_sweeps.py."""
    asked = ["prune", *given, "pruner=wanda", "save.model=false"]
    assert main(asked) == 0
    (done,) = Path("outputs").iterdir()
    written = (done / "results.json").stat().st_mtime_ns
    capfd.readouterr()
    assert main([*asked, "-m", f"model.path={broken_model},{model_dir}"]) == 1
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said
    assert "2 jobs: 1 failed, 1 finished before" in said
    assert "50.00 %" in said
    (failed,) = (path.parent for path in Path("outputs").glob("*/status.json") if path.parent != done)
    status = json.loads((failed / "status.json").read_text())
    assert (status["status"], "model.layers.1" in status["error"]) == ("failed", True)
    assert "Traceback" in (failed / "run.log").read_text()
    assert any("failed" in line and failed.name in line for line in said.splitlines())
    assert (done / "results.json").stat().st_mtime_ns == written


def test_the_same_command_finds_its_finished_run(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", *given]) == 0
    (folder,) = Path("outputs").iterdir()
    written = (folder / "results.json").stat().st_mtime_ns
    (folder / "blocks").mkdir()  # of a run that was killed when it had just finished
    capsys.readouterr()
    assert main(["prune", *given, "tracker=wandb"]) == 0
    assert capsys.readouterr().out.startswith("finished before: 50.00 % zeros")
    assert not (folder / "blocks").exists()
    assert main(["prune", *given, f"hydra.run.dir={folder}", "sparsity=0.6"]) == 2
    assert "holds a finished run of another request (sparsity: 0.5 before, 0.6 now)" in capsys.readouterr().err
    assert (folder / "results.json").stat().st_mtime_ns == written
    assert main(["prune", *given, "overwrite=true"]) == 0
    assert (folder / "results.json").stat().st_mtime_ns > written
    assert [path.name for path in Path("outputs").iterdir()] == [folder.name]


def test_a_finished_run_is_no_answer_where_its_calibration_tokens_have_changed(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(given[1].partition("=")[2])
    both = (given := [*given, "save.model=false"], ["-m", *given, "save.model=false", "seed=0"])  # one folder
    for arguments in both:
        assert main(["prune", *arguments]) == 0
    save_file({"input_ids": torch.zeros(4, 16, dtype=torch.long)}, path)
    capsys.readouterr()
    for arguments in both:
        assert main(["prune", *arguments]) == 2
        said = capsys.readouterr().err
        assert "holds a finished run of other inputs: calibration.path=" in said
        assert "overwrite=true" in said
    assert main(["prune", *given, "overwrite=true"]) == 0
    assert main(["prune", *given]) == 0
    assert "finished before" in capsys.readouterr().out


def test_the_program_exits_with_2_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "besa_exp", "prune", "sparsity=abc", "pruner=wandaa"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.splitlines()[0] == "besa prune: 2 problems, nothing was done"
    assert list(tmp_path.iterdir()) == []


def test_full_errors_show_the_traceback(given: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert main(["prune", *given, "pruner=wandaa"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "did you mean wanda?" in said


def loaded_after(*commands: list[str]) -> list[set[str]]:
    """What a process has imported after each of the commands."""
    program = f"""
import json, sys
from besa_exp.cli.main import main
for arguments in {commands!r}:
    main(arguments)
    print("LOADED", json.dumps(sorted(sys.modules)))
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = [line.partition(" ")[2] for line in answer.stdout.splitlines() if line.startswith("LOADED ")]
    return [set(json.loads(line)) for line in lines]


def test_short_answers_load_neither_torch_nor_hydra() -> None:
    commands = [[], ["--help"], ["-h"], ["--version"], ["prunne"], ["list", "models"]]
    heavy = {"torch", "hydra", "omegaconf", "transformers", "wandb", "datasets", "lm_eval", "numpy", "rich"}
    assert [loaded & heavy for loaded in loaded_after(*commands)] == [set()] * len(commands)


def test_a_refusal_loads_no_library_that_takes_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = [
        ["pruner=wandaa", "pruner.nonsense=1"],
        ["sparsity=2", "seed=x", "pruner=wanda"],
        ["sparsity=abc"],
        ["sparcity=0.5"],
        ["pattern=2:x"],
        ["model=local"],
        ["model.path=/no/such/model"],
        ["calibration=local", "tracker.mode=foo"],
        ["calibration.path=/no/such.txt", "calibration.num_samples=0"],
        ["evaluator.tasks=[piqaa]", "evaluator.perplexity_sets=[wikitex2]"],
        ["device=gpu"],
        ["-m", "seed=1,x", "pruner=wanda,besa"],
    ]
    slow = {"torch", "transformers", "wandb", "datasets", "lm_eval"}
    loaded = loaded_after(*(["prune", *arguments] for arguments in refused))
    assert "hydra" in loaded[0]
    assert [found & slow for found in loaded] == [set()] * len(refused)


def test_the_pruner_is_asked_also_when_something_else_is_wrong(refused: Refusal) -> None:
    said = refused("pruner=besa", "pattern=2:4", "pruner.epochs=0", "seed=x", "device=gpu")
    for what in ("pruner.epochs=0: must be at least 1", "seed=x", "device=gpu"):
        assert what in said
    assert "besa_paper needs a target above 0" in refused("pruner=besa_paper", "sparsity=0", "device=gpu")
