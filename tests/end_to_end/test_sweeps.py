"""`besa prune -m` by its real command line, with each launcher: what is done is skipped, one job's failure or death is
its own, and all jobs are told."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from wandb_file import one

from besa_exp.cli.main import main

LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local"],
}
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(params=list(LAUNCHERS))
def launcher(request: pytest.FixtureRequest) -> list[str]:
    """The arguments that choose it."""
    name = request.param
    if name != "basic":
        pytest.importorskip("joblib" if name == "joblib" else "submitit")
        pytest.importorskip(f"hydra_plugins.hydra_{name.removesuffix('_local')}_launcher")
    return LAUNCHERS[name]


def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The finished command."""
    command = [sys.executable, "-m", "besa_exp", "prune", "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ALONE)


def folders(pruner: str) -> list[Path]:
    return sorted(Path("outputs").glob(f"*-{pruner}-*"))


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


@pytest.fixture
def broken(model_dir: Path, tmp_path: Path) -> Path:
    """A model with a weight that is not a number."""
    folder = shutil.copytree(model_dir, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
def test_one_job_fails_the_others_are_done_and_skipped_on_a_second_start(
    launcher: list[str], given: list[str], model_dir: Path, broken: Path
) -> None:
    given = [argument for argument in given if not argument.startswith("model.path")]
    asked = [*given, f"model.path={broken},{model_dir}", "pruner=wanda", *launcher]
    first = sweep(*asked)
    assert first.returncode == 1, first.stdout + first.stderr
    bad, good = folders("wanda")
    assert (status(bad)["status"], status(good)["status"]) == ("failed", "done")
    assert "Traceback" in (bad / "run.log").read_text()
    assert "model.layers.1" in status(bad)["error"]
    assert "Traceback" not in first.stdout + first.stderr
    table = first.stdout.splitlines()
    assert any("failed" in line and bad.name in line for line in table)
    assert any(re.search(r"2 +done", line) and good.name in line for line in table)
    results = (good / "results.json").stat().st_mtime_ns
    second = sweep(*asked)
    assert second.returncode == 1
    assert "finished before" in second.stdout
    assert (good / "results.json").stat().st_mtime_ns == results


@pytest.mark.slow
def test_a_job_that_is_killed_is_told_as_failed_with_a_remedy_and_the_others_are_done(
    launcher: list[str], given: list[str]
) -> None:
    command = of_a_long_and_a_short_job(given, *launcher)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ALONE) as process:
        os.kill(_process_of_the_long_job(), signal.SIGKILL)
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 1, said
    assert "Traceback" not in said
    states = {status(folder)["status"]: folder for folder in folders("besa")}
    assert set(states) == {"failed", "done"}
    error = status(states["failed"])["error"]
    for told in ("SIGKILL", "out of memory", "n_jobs=1", "the same command goes on"):
        assert told in error
    assert "SIGKILL" in said
    assert "Traceback" in (states["failed"] / "run.log").read_text()
    for kept in ("blocks", "config.yaml", "environment.json"):
        assert (states["failed"] / kept).exists(), f"{kept} is gone"
    words = shlex.split(status(states["failed"])["command"])
    assert words[:2] == ["besa", "prune"]
    assert "pruner.epochs=100000" in words


@pytest.mark.slow
def test_a_sweep_that_is_terminated_leaves_its_job_interrupted_and_begins_no_other(given: list[str]) -> None:
    command = of_a_long_and_a_short_job(given)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ALONE) as process:
        _process_of_the_long_job()
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 143, said
    assert "Traceback" not in said
    assert "the same command goes on" in said
    assert [status(folder)["status"] for folder in folders("besa") if (folder / "status.json").is_file()] == [
        "interrupted"
    ]


@pytest.mark.slow
def test_a_job_that_is_terminated_stays_interrupted_and_the_others_are_done(given: list[str]) -> None:
    command = of_a_long_and_a_short_job(given)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ALONE) as process:
        os.kill(_process_of_the_long_job(), signal.SIGTERM)
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 1, said
    assert "the job was interrupted" in said
    assert {status(folder)["status"] for folder in folders("besa")} == {"interrupted", "done"}


def of_a_long_and_a_short_job(given: list[str], *more: str) -> list[str]:
    """The words of a sweep whose first job takes hours."""
    given = [argument for argument in given if not argument.startswith("pruner=")]
    return [sys.executable, "-m", "besa_exp", "prune", "-m", *given, "pruner=besa", "pruner.epochs=100000,1", *more]


def _process_of_the_long_job() -> int:
    """Once it optimises its first block."""
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        for folder in folders("besa"):
            metrics = folder / "metrics.jsonl"
            if metrics.is_file() and metrics.read_text().count('"step"') > 200:
                return status(folder)["process"]
        time.sleep(0.05)
    raise AssertionError("the long job did not begin")


def study(given: list[str], **swept: str) -> list[str]:
    """Arguments of a study of one's own, with what it sweeps; it is written into the working folder."""
    Path("presets/experiment").mkdir(parents=True)
    params = "".join(f"      {key}: {values}\n" for key, values in swept.items())
    Path("presets/experiment/own.yaml").write_text(
        f"# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n{params}"
    )
    kept = [line for line in given if line.partition("=")[0] not in swept]
    return [*kept, "--config-dir", "presets", "experiment=own"]


def test_a_sweep_keeps_masks_and_the_models_too_when_told(given: list[str]) -> None:
    assert sweep(*given, "save.model=true").returncode == 0
    (folder,) = folders("magnitude")
    assert (folder / "model" / "model.safetensors").is_file()
    assert (folder / "masks.safetensors").is_file()


def test_the_card_of_a_sweeps_job_shows_a_command_that_runs_this_job_alone(given: list[str]) -> None:
    assert sweep(*study(given, pruner="wanda", seed="3,4"), "save.model=true").returncode == 0
    first, second = folders("wanda")
    command = shlex.split((first / "model/README.md").read_text().split("```")[1])
    seed = json.loads((first / "results.json").read_text())["seed"]
    assert f"seed={seed}" in command
    assert main([*command[1:], "hydra.run.dir=alone"]) == 0
    assert (Path("alone") / "masks.safetensors").read_bytes() == (first / "masks.safetensors").read_bytes()
    assert (Path("alone") / "masks.safetensors").read_bytes() != (second / "masks.safetensors").read_bytes()


def test_in_wandb_a_job_is_in_its_studys_group_with_method_and_sparsity_to_filter_by(given: list[str]) -> None:
    asked = [line for line in study(given, pruner="wanda", seed="0") if line != "tracker=none"]
    assert main(["prune", *asked, "pruner=wanda", "sparsity=0.25", "hydra.mode=RUN", "hydra.run.dir=job"]) == 0
    run = one(Path("job"), "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.run_group, list(run.tags)) == ("own", ["wanda"])
    assert (config["method"], config["sparsity"]) == ("wanda", 0.25)


@pytest.mark.slow
def test_the_dense_model_is_scored_once_for_all_jobs_and_masks_alone_are_kept(
    launcher: list[str], given: list[str], tmp_path: Path
) -> None:
    given = [argument for argument in given if not argument.startswith(("pruner=", "evaluator="))]
    scored = ["evaluator=perplexity", f"evaluator.perplexity_sets=[{tmp_path / 'tokens.safetensors'}]"]
    asked = [*given, *scored, "evaluator.dense=true", "pruner=wanda,magnitude", *launcher]
    done = sweep(*asked)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = [(folder / "run.log").read_text() for folder in (*folders("wanda"), *folders("magnitude"))]
    assert sorted("dense model: perplexity on" in log for log in logs) == [False, True]
    assert sorted("dense model: scores reused from a run beside this one" in log for log in logs) == [False, True]
    results = [json.loads(path.read_text())["dense"] for path in Path("outputs").glob("*/results.json")]
    assert results[0] == results[1]
    assert len(list(Path("outputs/.dense_scores").glob("*.json"))) == 1
    kept = [(folder / "model").exists() for folder in Path("outputs").glob("*-s0-*")]
    assert kept == [False, False]
    assert len(list(Path("outputs").glob("*/masks.safetensors"))) == 2
