"""`besa prune -m` with each launcher: one job's death is its own, and all jobs are told. End to end because jobs are
processes, which are killed here, and what they share are files."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ready_process import BESA, TIMEOUT, start_ready
from wandb_file import one

from besa_exp.cli.main import main

LAUNCHERS = {  # beside Hydra's own, whose next job begins when one was killed as when one was terminated, below
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local"],
}
LONG_AND_SHORT = "100000,1"  # epochs of two jobs, of which the first takes hours


@pytest.fixture(params=list(LAUNCHERS))
def launcher(request: pytest.FixtureRequest) -> list[str]:
    """The arguments that choose it."""
    name = request.param
    pytest.importorskip("joblib" if name == "joblib" else "submitit")
    pytest.importorskip(f"hydra_plugins.hydra_{name.removesuffix('_local')}_launcher")
    return LAUNCHERS[name]


def folders(pruner: str) -> list[Path]:
    return sorted(Path("outputs").glob(f"*-{pruner}-*"))


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


@pytest.mark.slow
def test_a_job_that_is_killed_is_told_with_a_remedy_and_the_others_are_done_with_the_same_dense_scores(
    launcher: list[str], given: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scored = ["evaluator=perplexity", f"evaluator.perplexity_sets=[{tmp_path / 'tokens.safetensors'}]"]
    with signal_to_the_long_job(signal.SIGKILL):
        assert main(of_a_long_and_a_short_job(given, *scored, "evaluator.dense=true", *launcher)) == 1
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said
    states = {status(folder)["status"]: folder for folder in folders("besa")}
    assert set(states) == {"failed", "done"}
    killed, done = states["failed"], states["done"]
    for told in ("SIGKILL", "out of memory", "n_jobs=1", "run the same command again to resume"):
        assert told in status(killed)["error"]
    assert any("failed" in line and "SIGKILL" in line and killed.name in line for line in said.splitlines())
    assert any(re.search(r"2 +done", line) and done.name in line for line in said.splitlines())
    assert "Traceback" in (killed / "run.log").read_text()
    for kept in ("blocks", "config.yaml", "environment.json"):
        assert (killed / kept).exists(), f"{kept} is gone"
    words = shlex.split(status(killed)["command"])
    assert words[:2] == ["besa", "prune"]
    assert "pruner.epochs=100000" in words
    logs = [(folder / "run.log").read_text() for folder in (killed, done)]
    assert sorted("dense model: perplexity on" in log for log in logs) == [False, True]
    assert sorted("dense model: scores reused from a run beside this one" in log for log in logs) == [False, True]
    assert len(list(Path("outputs/.dense_scores").glob("*.json"))) == 1
    assert (done / "masks.safetensors").is_file()
    assert not (done / "model").exists()


@pytest.mark.slow
def test_a_sweep_that_is_terminated_leaves_its_job_interrupted_and_begins_no_other(given: list[str]) -> None:
    sweep = start_ready(BESA, *of_a_long_and_a_short_job(given))
    _process_of_the_long_job()
    os.kill(sweep.pid, signal.SIGTERM)
    ended = sweep.wait()
    assert ended.returncode == 143, ended.stdout
    assert "Traceback" not in ended.stdout
    assert "run the same command again to resume" in ended.stdout
    assert [status(folder)["status"] for folder in folders("besa") if (folder / "status.json").is_file()] == [
        "interrupted"
    ]


def of_a_long_and_a_short_job(given: list[str], *more: str) -> list[str]:
    """The words of a sweep of such jobs."""
    given = [argument for argument in given if not argument.startswith("pruner=")]
    return ["prune", "-m", *given, "pruner=besa", f"pruner.epochs={LONG_AND_SHORT}", *more]


@contextmanager
def signal_to_the_long_job(number: int) -> Iterator[None]:
    """Sent beside what is done meanwhile, which is interrupted where that job does not begin."""

    def send() -> None:
        try:
            os.kill(_process_of_the_long_job(), number)
        except BaseException:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # it waits for that job
            raise

    sender = threading.Thread(target=send)
    sender.start()
    yield
    sender.join()


def _process_of_the_long_job() -> int:
    """Once it optimises its first block."""
    limit = time.monotonic() + TIMEOUT
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


@pytest.mark.slow
def test_a_job_that_is_terminated_stays_interrupted_and_the_other_keeps_a_model_whose_card_shows_how_to_run_it_alone(
    given: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """In a study of one's own that is told to keep models."""
    asked = study(given, pruner="besa", seed="3", **{"pruner.epochs": LONG_AND_SHORT})
    with signal_to_the_long_job(signal.SIGTERM):
        assert main(["prune", *asked, "save.model=true"]) == 1
    assert "the job was interrupted" in capfd.readouterr().out
    interrupted, job = sorted(folders("besa"), key=lambda folder: status(folder)["status"], reverse=True)
    assert (status(interrupted)["status"], status(job)["status"]) == ("interrupted", "done")
    assert (job / "model" / "model.safetensors").is_file()
    command = shlex.split(json.loads((job / "results.json").read_text())["command"])
    (block,) = re.findall(r"^```\n(besa prune .*?)^```", (job / "model/README.md").read_text(), re.M | re.S)
    assert len(shlex.split(block)) == len(command)  # whose folders are left out
    assert "seed=3" in command
    assert main([*command[1:], "hydra.run.dir=alone"]) == 0
    alone = Path("alone")
    assert (alone / "masks.safetensors").read_bytes() == (job / "masks.safetensors").read_bytes()
    assert json.loads((alone / "results.json").read_text())["seed"] == 3


def test_in_wandb_a_job_is_in_its_studys_group_with_method_and_sparsity_to_filter_by(given: list[str]) -> None:
    asked = [line for line in study(given, pruner="wanda", seed="0") if line != "tracker=none"]
    assert main(["prune", *asked, "pruner=wanda", "sparsity=0.25", "hydra.mode=RUN", "hydra.run.dir=job"]) == 0
    run = one(Path("job"), "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.run_group, list(run.tags)) == ("own", ["wanda"])
    assert (config["method"], config["sparsity"]) == ("wanda", 0.25)
