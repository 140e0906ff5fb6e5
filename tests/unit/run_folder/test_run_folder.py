"""What is left in a run folder, whatever happens to the run."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from besa_exp.blocks.reports import BlockReport, LinearReport, Step
from besa_exp.errors import ConfigurationError, RunError
from besa_exp.evaluation.score import Scores
from besa_exp.run_folder.folder import RunFolder, read_results
from besa_exp.run_folder.status import is_done, read_status

ROOT = Path(__file__).parents[3]
STEP = Step(block=3, step=12, loss=0.75, reconstruction=0.5, penalty=0.25, expected_sparsity=0.125)
REPORT = BlockReport(
    index=3,
    linears=(LinearReport("self_attn.q_proj", 8, 3, 0.4), LinearReport("mlp.up_proj", 24, 13, 0.55)),
    loss_before=0.75,
    loss_after=0.5,
    seconds=1.5,
)


def finish_run(path: Path) -> None:
    with RunFolder.open(path) as folder:
        folder.log_step(STEP)
        folder.write_results({"seed": 1})


def fail_run(path: Path, error: BaseException) -> None:
    with RunFolder.open(path) as folder:
        folder.log_block(REPORT)
        raise error


def metrics(path: Path) -> list[dict]:
    """Without their times."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def test_status_says_running_while_the_run_lives_and_done_after_it(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as folder:
        during = read_status(tmp_path)
        assert not is_done(tmp_path)
        folder.write_results({})
    after = read_status(tmp_path)
    assert during is not None
    assert after is not None
    assert (during["status"], during["finished"], during["process"]) == ("running", None, os.getpid())
    assert (after["status"], after["error"], after["started"]) == ("done", None, during["started"])
    assert after["finished"] >= after["started"]
    assert is_done(tmp_path)


def test_a_run_without_results_is_not_done(tmp_path: Path) -> None:
    finish_run(tmp_path)
    (tmp_path / "results.json").unlink()
    assert not is_done(tmp_path)


def test_a_failed_run_says_why_and_keeps_what_was_measured(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="block 4"):
        fail_run(tmp_path, RunError("block 4, mlp.up_proj: the Hessian is not finite"))
    status = read_status(tmp_path)
    assert status is not None
    assert status["status"] == "failed"
    assert status["error"] == "RunError: block 4, mlp.up_proj: the Hessian is not finite"
    assert metrics(tmp_path)[0]["block"] == 3
    assert (tmp_path / "sparsity.csv").exists()


def test_the_traceback_of_a_failure_is_in_run_log_and_not_on_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_run(tmp_path, ZeroDivisionError("division by zero"))
    log = (tmp_path / "run.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "ZeroDivisionError: division by zero" in log
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_run(tmp_path, KeyboardInterrupt())
    status = read_status(tmp_path)
    assert status is not None
    assert (status["status"], status["error"]) == ("interrupted", "KeyboardInterrupt")


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    finish_run(tmp_path)
    before = (tmp_path / "status.json").read_bytes()
    with pytest.raises(ConfigurationError, match=r"finished run.*overwrite=true"), RunFolder.open(tmp_path):
        pass
    assert (tmp_path / "status.json").read_bytes() == before
    assert read_results(tmp_path) == {"seed": 1}


def test_overwrite_removes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    finish_run(tmp_path)
    for name in ("model/config.json", "wandb/run_id", "notes/mine.txt", ".hydra/config.yaml", "model.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with RunFolder.open(tmp_path, overwrite=True):
        present = {path.name for path in tmp_path.iterdir()}
    assert present == {".lock", "status.json", "run.log", "notes", ".hydra", "model.txt"}
    assert (tmp_path / "notes" / "mine.txt").read_text() == "x"


def test_a_folder_with_files_that_no_run_wrote_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("precious")
    (tmp_path / "status.json").write_text('{"status": "mine"}')
    match = "is not a run folder, and a run would replace its model, status.json"
    with pytest.raises(ConfigurationError, match=match), RunFolder.open(tmp_path, overwrite=True):
        pass
    assert (tmp_path / "model" / "weights").read_text() == "precious"
    assert (tmp_path / "status.json").read_text() == '{"status": "mine"}'


def test_a_file_cannot_be_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match=r"file cannot hold a run.*must be a folder"):
        RunFolder.open(tmp_path / "file").__enter__()


def test_metrics_hold_a_line_for_each_step_block_and_score(tmp_path: Path) -> None:
    values = {"perplexity": {"ptb": None, "embedded": 3.5}, "zero_shot": {"piqa": {"acc,none": 0.5}}}
    scores = Scores.from_dict(values | {"unavailable": {"ptb": "no network"}})
    with RunFolder.open(tmp_path) as folder:
        folder.log_step(STEP)
        folder.log_block(REPORT)
        folder.log_scores("dense", scores)
        lines = metrics(tmp_path)  # each line is there at once
    assert lines[0] == {
        "kind": "step", "block": 3, "step": 12, "loss": 0.75, "reconstruction": 0.5, "penalty": 0.25,
        "expected_sparsity": 0.125,
    }  # fmt: skip
    assert lines[1] == {
        "kind": "block", "block": 3, "sparsity": 0.5, "reconstruction_loss": 0.5, "reconstruction_loss_before": 0.75,
        "seconds": 1.5,
        "linears": {
            "self_attn.q_proj": {"weights": 8, "pruned": 3, "sparsity": 0.375, "allocated": 0.4},
            "mlp.up_proj": {"weights": 24, "pruned": 13, "sparsity": 13 / 24, "allocated": 0.55},
        },
    }  # fmt: skip
    assert lines[2] == {
        "kind": "scores", "which": "dense", "perplexity": {"ptb": None, "embedded": 3.5},
        "zero_shot": {"piqa": {"acc,none": 0.5}}, "unavailable": {"ptb": "no network"},
    }  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_stops_the_run_and_is_not_written(tmp_path: Path, value: float) -> None:
    with RunFolder.open(tmp_path) as folder:
        with pytest.raises(RunError, match=f"block index 3, step 12, loss is {value}"):
            folder.log_step(Step(3, 12, value, 0.5, 0.25, 0.125))
        with pytest.raises(RunError, match=r"results.json, dense, perplexity, ptb is"):
            folder.write_results({"dense": {"perplexity": {"ptb": value}}})
        with pytest.raises(RunError, match=r"results.json, blocks, 1, loss is"):
            folder.write_results({"blocks": [{"loss": 1.0}, {"loss": value}]})
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "results.json").exists()


def test_equal_results_are_equal_bytes_whatever_the_order_of_keys(tmp_path: Path) -> None:
    contents = []
    for number, results in enumerate(({"b": [{"d": 1, "c": 0.1}], "a": 2}, {"a": 2, "b": [{"c": 0.1, "d": 1}]})):
        with RunFolder.open(tmp_path / str(number)) as folder:
            folder.write_results(results)
        contents.append((tmp_path / str(number) / "results.json").read_text())
    assert contents[0] == contents[1]
    assert contents[0].index('"a"') < contents[0].index('"b"') < contents[0].index('"c"') < contents[0].index('"d"')


def test_linears_keep_the_models_order_in_results_json(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as folder:
        folder.write_results({"blocks": [{"linears": {"q_proj": {}, "k_proj": {}, "down_proj": {}}}], "linears": 3})
    assert list(read_results(tmp_path)["blocks"][0]["linears"]) == ["q_proj", "k_proj", "down_proj"]


def test_sparsity_csv_has_a_row_for_each_linear_of_each_block(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as folder:
        folder.log_block(REPORT)
        folder.log_block(REPORT)
    with (tmp_path / "sparsity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["linear"] for row in rows] == ["self_attn.q_proj", "mlp.up_proj"] * 2
    losses = ["reconstruction_loss_start", "reconstruction_loss"]
    assert list(rows[1]) == ["block", "linear", "weights", "pruned", "sparsity", "allocated", *losses]
    assert (rows[1]["block"], rows[1]["weights"], rows[1]["pruned"]) == ("3", "24", "13")
    assert [float(rows[1][name]) for name in ("sparsity", "allocated", *losses)] == [13 / 24, 0.55, 0.75, 0.5]


def test_lines_say_when_they_were_written_also_when_a_later_attempt_goes_on(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as folder:
        report = replace(REPORT, steps=(STEP,))
        folder.log_step(STEP)
        folder.log_block(report)
        written = [json.loads(line)["time"] for line in folder.metrics.read_text().splitlines()]
        assert [datetime.fromisoformat(time).tzname() for time in written] == ["UTC", "UTC"]
        folder.metrics.write_text(re.sub(r'"time": "[^"]+"', '"time": "long ago"', folder.metrics.read_text()))
        folder.rewind([report])
        assert [json.loads(line)["time"] for line in folder.metrics.read_text().splitlines()] == ["long ago"] * 2


def test_what_a_later_attempt_says_again_of_the_dense_model_stands_once(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path) as folder:
        for _ in range(2):
            folder.log_scores("dense", Scores())
        folder.rewind([REPORT])
        assert [line["kind"] for line in metrics(tmp_path)] == ["scores", "block"]
        folder.rewind([REPORT], scored=False)
        assert [line["kind"] for line in metrics(tmp_path)] == ["block"]


@pytest.mark.parametrize("named", [True, False])
def test_what_no_identity_names_the_request_of_is_not_gone_on_with(named: bool, tmp_path: Path) -> None:
    with pytest.raises(RunError):
        fail_run(tmp_path, RunError("full"))
    kept = ("recovery/tokens.safetensors", "structure.json", "scores.json")
    for name in (*kept, *(["blocks/identity.json"] if named else [])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with RunFolder.open(tmp_path, resume={"seed": 1}):
        there = [name for name in kept if (tmp_path / name).is_file()]
    assert there == ([*kept] if named else ["scores.json"])


def test_run_log_holds_the_projects_lines_and_all_warnings_and_logging_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, root = logging.getLogger("besa_exp"), logging.getLogger()
    before = (project.level, list(root.handlers))
    monkeypatch.setattr(logging.getLogger("elsewhere"), "level", logging.DEBUG)
    with RunFolder.open(tmp_path):
        logging.getLogger("besa_exp.anything").info("block 1 is pruned")
        logging.getLogger("elsewhere").warning("a library warns")
        logging.getLogger("elsewhere").info("a library chats")
    logging.getLogger("besa_exp.anything").error("after the run")
    log = (tmp_path / "run.log").read_text()
    assert "INFO besa_exp.anything: block 1 is pruned" in log
    assert "WARNING elsewhere: a library warns" in log
    assert "a library chats" not in log
    assert "after the run" not in log
    assert (project.level, list(root.handlers)) == before


def test_a_folder_that_another_process_writes_is_left_as_it_is(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, writes=False)
    folder.log_step(STEP)
    folder.log_block(REPORT)
    folder.log_scores("dense", Scores())
    folder.rewind([REPORT])
    folder.write_config({})
    folder.write_environment({})
    folder.write_results({"measured_sparsity": 0.5})
    assert not list(tmp_path.iterdir())
    assert folder.model == tmp_path / "model"
