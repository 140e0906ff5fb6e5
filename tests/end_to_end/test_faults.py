"""What goes wrong around a run: the hub, the clock, and the moment of a kill that falls into the evaluation. End to end
because each fault comes from outside the program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ready_process import TIMEOUT
from resumed_runs import assert_equal_runs, killed, metrics_of, results_of
from wandb_file import history, one

from besa_exp.cli.main import main
from besa_exp.display.wandb_run import _run_id

NO_HUB = """
import json, socket, sys
from pathlib import Path
from besa_exp.cli.main import main
from besa_exp.hub import client
from besa_exp.machine.process import run_as_process
client.HUB_TIMEOUT = 1.0
lost, scored = json.loads(sys.argv[1])
def ask():
    with socket.socket() as silent:  # takes connections and never answers; closed, its port refuses them
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        import huggingface_hub.constants
        huggingface_hub.constants.ENDPOINT = f"http://127.0.0.1:{silent.getsockname()[1]}"
        first, asked = main(lost), 0
        silent.setblocking(False)
        try:
            while silent.accept():
                asked += 1
        except BlockingIOError:
            pass
    second = main(lost)
    third = main([*lost, "dry_run=true"])
    left = list(Path.cwd().iterdir())
    print("codes", first, second, third, "asked", asked)
    huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
    print("SCORED", file=sys.stderr, flush=True)
    return f"left behind: {left}" if left else main(scored)
run_as_process(ask)
"""


def test_a_hub_that_cannot_be_reached_is_not_asked_over_and_over_and_what_needs_none_of_it_is_scored(
    given: list[str], request_arguments: list[str], tmp_path: Path
) -> None:
    """In one process: a model of a silent hub and of none, three times refused with nothing left behind; then sets and
    tasks of the hub that are not waited for, beside tokens of one's own."""
    lost = [argument for argument in given if not argument.startswith("model.path")]
    lost = ["prune", *lost, "model.path=an-owner/a-model"]
    tokens = next(key for key in request_arguments if key.startswith("calibration.path=")).partition("=")[2]
    scored = [key for key in request_arguments if not key.startswith(("evaluator", "pruner"))]
    scored += ["pruner=wanda", "evaluator=none", f"evaluator.perplexity_sets=[c4,wikitext2,{tokens}]"]
    scored += ["evaluator.tasks=[openbookqa]", "evaluator.limit=2", f"hydra.run.dir={tmp_path / 'run'}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", NO_HUB, json.dumps([lost, scored])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    assert done.returncode == 0, done.stderr
    _, *codes, _, asked = next(line for line in done.stdout.splitlines() if line.startswith("codes")).split()
    assert codes == ["2", "2", "2"]
    assert int(asked) <= 2, "the client itself asks a silent hub five times"
    said = done.stderr.partition("SCORED")[0]
    assert said.count("the hub cannot be reached") == 3
    assert "refused" in said
    assert said.count("hf download an-owner/a-model") == 3
    assert "Traceback" not in said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [name for name, value in results["perplexity"].items() if value] == [tokens]
    assert set(results["unavailable"]) == {"c4", "wikitext2", "openbookqa"}
    assert all("the hub cannot be reached" in reason for reason in results["unavailable"].values())
    assert "Retry" not in done.stdout + done.stderr


@pytest.mark.parametrize("damage", ["gone", "cut off"])
def test_a_finished_run_without_whole_results_is_run_again(given: list[str], damage: str) -> None:
    command = ["prune", *given, "hydra.run.dir=run"]
    assert main(command) == 0
    results = Path("run/results.json")
    whole = json.loads(results.read_text())
    if damage == "gone":
        results.unlink()
    else:
        results.write_text(results.read_text()[:100])
    assert main(command) == 0
    assert json.loads(results.read_text())["blocks"][0]["linears"] == whole["blocks"][0]["linears"]


@pytest.mark.parametrize("damaged", [b"", b"\x00\xff", b"a/b"])
def test_a_damaged_id_of_wandb_is_replaced_and_then_kept(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "run_id").write_bytes(damaged)
    identity = _run_id(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", identity)
    assert _run_id(tmp_path) == identity


SCORED = re.compile(r"(dense|pruned) model: (?:perplexity on|zero-shot) (\S+?)(, scored before)?$", re.MULTILINE)


def test_a_run_killed_while_it_is_scored_scores_nothing_twice(request_arguments: list[str], tmp_path: Path) -> None:
    """Killed with one of the dense model's scores, then with all three, then with one of the pruned model's."""
    asked = [*request_arguments, "pruner=wanda", "evaluator.dense=true"]
    asked += ["evaluator.tasks=[embedded_continuations]", "evaluator.limit=2"]
    assert main([*asked, f"hydra.run.dir={tmp_path / 'there' / 'unbroken'}"]) == 0
    folder = tmp_path / "here" / "run"  # elsewhere: runs side by side share the dense model's scores
    kills = killed(asked, folder, [{"scores": 1}, {"scores": 3}, {"scores": 4}])
    assert main([*asked, f"hydra.run.dir={folder}"]) == 0
    assert results_of(folder) == results_of(tmp_path / "there" / "unbroken")
    attempts = (folder / "run.log").read_text().split("loading /")[1:]
    assert len(attempts) == len(kills) + 1
    for kill, later in zip(kills, attempts[1:], strict=True):
        told = {(which, name): bool(before) for which, name, before in SCORED.findall(later)}
        finished = {(which, name) for which, name in kill["scores"]}
        assert finished, "killed too early"
        assert {which for which, _ in finished} <= {"dense", "pruned"}
        assert all(told.get(score, True) for score in finished), "what was scored is scored again"
    assert ("pruned", kills[-1]["scores"][-1][1]) in {score for score, before in told.items() if before}


def test_a_run_killed_in_the_search_for_its_budget_goes_on_with_it(
    request_arguments: list[str], tmp_path: Path
) -> None:
    """Killed in the search twice. (After it, blocks are too fast to be sure of a kill before the end.)"""
    asked = [*request_arguments, "pruner=wanda", "budget=evopress", "budget.generations=20"]
    assert main([*asked, f"hydra.run.dir={tmp_path / 'unbroken'}"]) == 0
    folder = tmp_path / "run"
    kills = killed(asked, folder, [{"generations": 3}, {"generations": 8}])
    assert 3 <= kills[0]["generations"] < 20
    assert not kills[1]["blocks"]
    assert main([*asked, f"hydra.run.dir={folder}"]) == 0
    assert_equal_runs(folder, tmp_path / "unbroken")
    generations = [
        int(number) for number in re.findall(r"evopress, generation (\d+)", (folder / "run.log").read_text())
    ]
    assert sorted(set(generations)) == list(range(1, 21))
    assert len(generations) <= 20 + 2, "a finished generation was searched again"


def test_wandb_has_each_point_of_a_run_that_was_killed_twice_once(
    request_arguments: list[str], unbroken: Path, tmp_path: Path
) -> None:
    folder, asked = tmp_path / "run", [*request_arguments, "tracker=wandb"]
    killed(asked, folder, [{"blocks": 1}, {"blocks": 3}])
    run_id = (folder / "wandb" / "run_id").read_text()
    assert main([*asked, f"hydra.run.dir={folder}"]) == 0
    assert_equal_runs(folder, unbroken)
    assert (folder / "wandb" / "run_id").read_text() == run_id == one(folder, "run").run_id
    points, lines = history(folder), metrics_of(folder)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [point["optimisation_step"] for point in points if "step/loss" in point] == list(range(len(steps)))
    assert [point["step/loss"] for point in points if "step/loss" in point] == [line["loss"] for line in steps]
    blocks = [(line["block"], line["reconstruction_loss"]) for line in lines if line["kind"] == "block"]
    found = [
        (point["block"], point["block/reconstruction_loss"]) for point in points if "block/reconstruction_loss" in point
    ]
    assert found == blocks


def test_a_clock_that_goes_backwards_changes_nothing(
    request_arguments: list[str], unfinished: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that the killed run left is from the future, and while the run goes on each look at the clock is earlier."""
    later = time.time() + 10 * 365 * 86400
    for path in unfinished.rglob("*"):
        os.utime(path, (later, later))
    clock = iter(range(10**9, 0, -60))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 10**9)
    assert main([*request_arguments, f"hydra.run.dir={unfinished}"]) == 0
    monkeypatch.undo()
    assert_equal_runs(unfinished, unbroken)
    assert "resuming: 3 of" in " ".join((unfinished / "run.log").read_text().split())
