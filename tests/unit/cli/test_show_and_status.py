"""`besa show`, `besa list --json` and `besa status`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

import pytest
from run_folders import block, finished_run, unfinished_run

from besa_exp.cli.main import main
from besa_exp.cli.show import in_words, keys_of
from besa_exp.presets import CONF_DIR, groups, presets
from besa_exp.run_folder.lock import locked


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(words) == code
    return capsys.readouterr().out


def test_a_preset_is_shown_with_type_value_and_meaning_of_each_key(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "show", "pruner=besa").splitlines()
    assert lines[0].startswith("pruner=besa: BESA, the default")
    (row,) = [line for line in lines if line.startswith("pruner.batch_size ")]
    assert row.split(None, 1)[1].split("  ")[0] == "1"
    assert "whole number" in row
    assert "samples a step" in row
    assert "_target_" not in "".join(lines)


def test_a_narrow_screen_gets_each_key_above_its_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "64")
    monkeypatch.setenv("LINES", "24")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", said(capsys, "show", "pruner=besa")).splitlines()
    at = lines.index("pruner.batch_size = 1  whole number")
    assert lines[at + 1].startswith("    samples a step")
    assert max(map(len, lines)) <= 64


def test_keys_of_a_group_inside_a_preset_and_of_the_one_it_builds_on_are_shown() -> None:
    found = {key.name: key for key in keys_of(CONF_DIR / "pruner" / "best.yaml")}
    assert found["tuning.epochs"].comment == "passes over the calibration set"  # as a base file says it
    assert found["model.steps"].value == "14"
    schedule = {key.name: key for key in keys_of(CONF_DIR / "recovery" / "mezo.yaml")}["schedule"]
    assert (schedule.value, schedule.comment.partition(":")[0]) == ("constant", "how the step size falls")  # both


def test_a_runs_own_keys_and_one_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    everything = said(capsys, "show")
    assert "fraction of zeros asked of the linears" in everything
    assert "auto or device or host or disk" in everything
    assert "hydra" not in everything
    one = said(capsys, "show", "sparsity")
    assert "fraction of zeros" in one
    assert "pattern" not in one


def test_a_preset_of_ones_own_is_shown_over_what_it_builds_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evaluator").mkdir()
    (tmp_path / "evaluator" / "mine.yaml").write_text("# my scores\ndefaults: [none]\ntasks: [piqa]\n")
    lines = said(capsys, "show", "evaluator=mine", "--config-dir", str(tmp_path)).splitlines()
    assert lines[0] == "evaluator=mine: my scores"
    values = {words[0]: words[1] for line in lines if len(words := line.split()) > 1}
    assert (values["evaluator.tasks"], values["evaluator.seq_len"]) == ("[piqa]", "null")


def test_a_value_that_a_preset_replaces_by_a_group_of_keys_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "pruner").mkdir()
    mine = tmp_path / "pruner" / "mine.yaml"
    mine.write_text(
        "# mine\ndefaults: [besa]\nimportance:\n  _target_: mine.Mine\n  power: 0.5  # of the norm\nmodel: null\n"
    )
    names = {key.name for key in keys_of(mine)}
    assert {"importance.power", "model", "epochs"} <= names
    assert not {"importance", "model.steps"} & names


def test_programs_read_the_listing_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pruner").mkdir()
    (tmp_path / "pruner" / "mine.yaml").write_text("# of mine\n_target_: mine.Mine\n")
    assert main(["list", "pruners", "--config-dir", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"pruner": presets("pruner") | {"mine": f"of mine (of {tmp_path})"}}
    assert main(["list", "--json"]) == 0
    assert [*json.loads(capsys.readouterr().out)] == groups()


def test_an_experiment_is_shown_with_what_it_chooses_and_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "show", "experiment=joint")
    assert "besa show evaluator=perplexity" in shown
    assert "swept: one job each" in shown
    assert "list of text" in shown  # the type of evaluator.perplexity_sets


@pytest.mark.parametrize("group", groups())
def test_every_preset_can_be_shown(group: str) -> None:
    for name in presets(group):
        for key in keys_of(CONF_DIR / group / f"{name}.yaml"):
            assert "\n" not in key.value


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("pruner=besaa", "no such preset (did you mean besa?)"),
        ("prunner=besa", "did you mean pruner?"),
        ("spasity", "did you mean sparsity?"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(word: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", word]) == 2
    assert told in capsys.readouterr().err


def test_types_are_told_in_words() -> None:
    assert in_words(int | None) == "whole number or null"
    assert in_words(tuple[str, ...]) == "list of text"
    assert in_words(Path | Literal["row", "linear"]) == "row or linear"  # a class is nothing that is typed in


@pytest.fixture
def some_runs(tmp_path: Path) -> Path:
    finished_run(tmp_path / "done")
    failed = unfinished_run(
        tmp_path / "failed", status="failed", error="RunError: block 1, mlp.down_proj", command="besa prune x=1"
    )
    (failed / "config.yaml").write_text("model: {path: models/tiny}\n")
    (failed / "metrics.jsonl").write_text(json.dumps({"kind": "block", "block": 0}) + "\n")
    unfinished_run(tmp_path / "gone", status="running")
    return tmp_path  # fmt: skip


def test_status_tells_what_failed_how_far_it_got_and_how_to_go_on(
    some_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alive = unfinished_run(some_runs / "alive", status="running")
    with locked(alive):
        shown = said(capsys, "status", str(some_runs), code=1)
    assert shown.splitlines()[0] == "4 runs: 1 running, 1 failed, 1 interrupted (killed), 1 done"
    (failed,) = [line for line in shown.splitlines() if line.startswith("failed")]
    assert "1 of 2" in failed  # a finished run of the same model has two
    assert "block 1, mlp.down_proj" in failed
    assert "2 left. Run the same commands again to finish them" in shown
    assert "  besa prune x=1" in shown
    assert "done  " not in shown


def test_status_names_runs_apart_counts_no_block_of_none_and_shows_commands_to_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_run(tmp_path / "narrow", {"blocks": [block(0)]})
    finished_run(tmp_path / "whole")
    finished_run(tmp_path / "narrower", {"blocks": [block(0)]})
    command = f"besa prune {'x' * 200}"
    for place in ("one", "two"):
        failed = unfinished_run(tmp_path / place / "run", status="failed", error="as asked", command=command)
        (failed / "config.yaml").write_text("model: {path: models/tiny}\n")
        (failed / "metrics.jsonl").write_text(json.dumps({"kind": "block", "block": 0}) + "\n")
    shown = said(capsys, "status", str(tmp_path), code=1)
    assert f"  {command}\n" in shown
    assert "".join(shown.split()).count("1of2") == 2
    assert all(str(tmp_path / place / "run") in "".join(shown.split()) for place in ("one", "two"))


@pytest.mark.parametrize("asked", ["method: dense", "checkpoint: outputs/run"])
def test_status_counts_no_block_of_a_run_that_prunes_none(
    asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks are written before it is scored or tuned."""
    finished_run(tmp_path / "whole")
    cut_off = unfinished_run(tmp_path / "cut_off", status="interrupted")
    (cut_off / "config.yaml").write_text(f"model: {{path: models/tiny}}\n{asked}\n")
    lines = [{"kind": "block", "block": index} for index in range(2)]
    (cut_off / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "of 2" not in said(capsys, "status", str(tmp_path))


def test_status_of_finished_runs_is_one_line_and_all_lists_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_run(tmp_path / "done")
    assert said(capsys, "status", str(tmp_path)) == "1 run: 1 done\n"
    listed = said(capsys, "status", str(tmp_path), "--all")
    assert "1 min 00 s" in listed
    assert "what happened" not in listed  # nothing did
