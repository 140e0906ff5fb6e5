"""What a run shows, on a terminal and in a plain file."""

from __future__ import annotations

import itertools
import logging
import os
import pty
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich import box
from safetensors.torch import save_file

from besa_exp.blocks.reports import BlockReport, LinearReport, Step
from besa_exp.checkpoints.files import save_masks
from besa_exp.display import progress as progress_line
from besa_exp.display.console import PLAIN_WIDTH, RunConsole, next_steps
from besa_exp.display.progress import PruningProgress, StageLine, duration
from besa_exp.display.tables import as_text, outline, result_tables, sparsity_tables
from besa_exp.evaluation.simulated_speed import MODEL
from besa_exp.settings import CalibrationSettings, EvaluatorSettings, ModelSettings, RunSettings, TrackerSettings
from besa_exp.texts.sources import GIVEN

ROOT = Path(__file__).parents[3]
NAMES = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]


@dataclass(frozen=True)
class SomePruner:
    candidates: int = 100


SETTINGS = RunSettings(
    model=ModelSettings("tiny", "some/where"),
    calibration=CalibrationSettings("c4", num_samples=16, seq_len=64),
    pruner=SomePruner(),
    pruner_name="besa",
    evaluator=EvaluatorSettings("quick", perplexity_sets=("ptb",), tasks=("piqa",), dense=True),
    tracker=TrackerSettings("wandb"),
    sparsity=0.6,
    pattern="2:4",
    seed=5,
)


def block_of(index: int, names: list[str] = NAMES) -> dict[str, Any]:
    linears = {
        name: {"weights": 10000, "pruned": 4000 + 100 * index + number, "sparsity": 0.0}
        for number, name in enumerate(names)
    }
    return {"index": index, "reconstruction_loss": {"before": 0.25, "after": 0.125 + index}, "linears": linears}


RESULTS: dict[str, Any] = {
    "pruner": "besa", "target_sparsity": 0.5, "measured_sparsity": 0.50012, "seconds": {"total": 200.0},
    "blocks": [block_of(0), block_of(1)],
    "perplexity": {"embedded": 12.5, "ptb": None},
    "zero_shot": {"piqa": {"acc,none": 0.625, "acc_stderr,none": 0.01}},
    "unavailable": {"ptb": "no network"},
    "dense": {"perplexity": {"embedded": 10.0, "ptb": None}, "zero_shot": {"piqa": {"acc,none": 0.75}}},
}  # fmt: skip
ON_TERMINAL = """
import itertools, json, logging, sys
from pathlib import Path
from types import SimpleNamespace
from rich.progress import Progress
from besa_exp.display import progress as shown
from besa_exp.display.console import RunConsole
from besa_exp.blocks.reports import BlockReport, LinearReport, Step

class Drawn(Progress):
    def update(self, *arguments, **named):
        super().update(*arguments, **named)
        self.refresh()  # by itself it does so ten times a second

shown.Progress, shown.time = Drawn, SimpleNamespace(monotonic=itertools.count().__next__)
with RunConsole(verbose=True) as console:
    with console.pruning(2) as progress:
        for block in range(2):
            for step in range(4):
                progress.step(Step(block, step, 0.75, 0.5, 0.25, 0.5))
            progress.block(BlockReport(block, (LinearReport("up_proj", 8, 4, 0.5),), 0.5, 0.25, 1.5))
        logging.getLogger("besa_exp.display.tracker").warning("W&B is [left] out")
    console.summary(json.loads(sys.argv[1]), Path("outputs/a-run"))
"""


def rows(text: str) -> list[list[str]]:
    """The cells of the table rows in `text`."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def plain_lines(width: int = PLAIN_WIDTH, style: box.Box = box.MARKDOWN, **changes: Any) -> str:
    results = RESULTS | changes
    tables = [*sparsity_tables(results, width, style), *result_tables(results, style)]
    return "\n".join(as_text(table, width) for table in tables)


def seen_on_terminal(columns: int) -> str:
    """What a process that shows a run of two blocks writes to a terminal, without colours and cursor movements."""
    import json

    master, terminal = pty.openpty()
    variables = {"COLUMNS": str(columns), "LINES": "50", "TERM": "xterm", "LANG": "C.UTF-8"}
    command = [sys.executable, "-c", ON_TERMINAL, json.dumps(RESULTS)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | variables, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(master, 65536):
            shown += part
    except OSError:  # the terminal is closed
        pass
    os.close(master)
    assert process.wait() == 0, shown.decode()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r", "\n")


def test_a_plain_run_is_one_line_a_block_in_ascii(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_line, "time", SimpleNamespace(monotonic=itertools.count(0.0, 0.001).__next__))
    with RunConsole() as console, console.pruning(num_blocks=2) as progress:
        for index in range(2):
            progress.step(Step(index, 0, 0.75, 0.5, 0.25, 0.5))
            progress.block(BlockReport(index, (LinearReport("up_proj", 8, 4, 0.5),), 0.75, 0.25, 61.0))
    first, second = capsys.readouterr().out.splitlines()
    line = "block 1 of 2: sparsity 0.5000, reconstruction loss 0.25 (0.75 at the start), 1 min 01 s, about 0 s left"
    assert first == line
    assert second.startswith("block 2 of 2: ")
    assert "left" not in second
    assert first.isascii()


def test_the_plan_names_every_choice_and_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    with RunConsole(quiet=True, verbose=True) as console:
        console.plan(SETTINGS, {"blocks": 8})
    shown = capsys.readouterr().out
    for text in ("tiny (some/where)", "besa (candidates=100)", "sparsity 0.6, 2:4", "c4, 16 x 64 tokens"):
        assert text in shown
    for text in ("ptb, piqa, dense too", "wandb, offline", "seed         5", "blocks       8"):
        assert text in shown


def test_the_plan_tells_the_size_of_a_token_file_not_the_one_configured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"input_ids": torch.ones(3, 20, dtype=torch.int64)}, tmp_path / "tokens.safetensors")
    given = replace(SETTINGS.calibration, path=str(tmp_path / "tokens.safetensors"))
    with RunConsole(quiet=True, verbose=True) as console:
        console.plan(replace(SETTINGS, calibration=given), {})
    shown = capsys.readouterr().out
    assert "tokens.safetensors, 3 x 20 tokens" in shown.replace("\n", "").replace("             ", "")
    assert "16 x 64" not in shown


def test_warnings_are_shown_as_such_and_only_while_the_console_is_open(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("besa_exp.anything")
    with RunConsole(quiet=True):
        logger.warning("look out")
    logger.warning("too late")
    assert capsys.readouterr().out == "WARNING: look out\n"


def test_the_summary_has_a_row_a_block_with_each_linear_type_and_the_losses() -> None:
    head, _, first, second, _, total = rows(plain_lines())[:6]
    assert head == ["index", "q", "k", "v", "o", "gate", "up", "down", "all", "start", "loss"]
    assert first == ["0", "40.00", "40.01", "40.02", "40.03", "40.04", "40.05", "40.06", "40.03", "0.25", "0.125"]
    assert second[:2] + second[-3:] == ["1", "41.00", "41.03", "0.25", "1.125"]
    assert total[:2] + total[-3:] == ["all", "40.50", "40.53", "", ""]


def test_experts_of_one_type_share_a_column() -> None:
    names = [f"mlp.experts.{number}.w{kind}" for number in range(4) for kind in (1, 2)]
    head, _, first, *_ = rows(plain_lines(blocks=[block_of(0, names)]))
    assert head[1:4] == ["w1", "w2", "all"]
    assert first[1:3] == ["40.03", "40.04"]


def test_types_with_the_same_last_name_keep_their_paths() -> None:
    head, *_ = rows(plain_lines(blocks=[block_of(0, ["self_attn.out_proj", "cross_attn.out_proj"])]))
    assert head[1:3] == ["self_attn.out_proj", "cross_attn.out_proj"]


def test_scores_stand_beside_the_dense_ones_with_their_difference() -> None:
    shown = plain_lines()
    scores = rows(shown)[-4:]
    assert scores[1:] == [
        ["perplexity embedded ↓", "10.0000", "12.5000", "+25.00%"],
        ["perplexity ptb ↓", "n/a", "n/a", ""],
        ["piqa acc ↑", "0.7500", "0.6250 ± 0.0100", "-0.1250"],
    ]
    assert "n/a ptb: no network" in shown


def test_without_dense_scores_there_is_nothing_to_compare_with() -> None:
    assert rows(plain_lines(dense=None))[-3:] == [
        ["perplexity embedded ↓", "12.5000"],
        ["perplexity ptb ↓", "n/a"],
        ["piqa acc ↑", "0.6250 ± 0.0100"],
    ]


@pytest.mark.parametrize("width", [120, 80, 60, 50])
def test_a_narrow_screen_gets_more_tables_and_every_number_whole(width: int) -> None:
    shown = plain_lines(width)
    assert max(map(len, shown.splitlines())) <= width
    cells = {cell for row in rows(shown) for cell in row}
    assert {f"{percent}.0{number}" for percent in (40, 41) for number in range(7)} <= cells


def test_a_llama_fits_80_columns_in_one_table() -> None:
    assert plain_lines(80, box.SIMPLE_HEAD).count("reconstruction loss") == 1
    assert plain_lines(60, box.SIMPLE_HEAD).count("reconstruction loss") > 1


@pytest.mark.parametrize("verbose", [True, False])
def test_zeros_by_block_are_shown_where_asked_and_in_the_log_always(
    verbose: bool, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with RunConsole(quiet=True, verbose=verbose) as console:
        console.summary(RESULTS, Path("outputs/a-run"))
    shown = capsys.readouterr().out
    assert ("zeros in %" in shown) == verbose
    assert "perplexity embedded ↓" in shown
    assert any("zeros in %" in line for line in caplog.messages)


def test_two_lines_say_what_is_about_to_be_done() -> None:
    first, second = outline(SETTINGS)
    assert first.startswith("besa ")
    assert first.endswith("· tiny · 60 % 2:4 · seed 5")
    assert second == "pruner besa · calibration c4 16 x 64 tokens · scores perplexity on ptb, piqa, dense too"
    given = replace(SETTINGS, calibration=replace(SETTINGS.calibration, name=GIVEN[1]))  # of a size unknown here
    assert "calibration given tokens as they are ·" in outline(given)[1]


def test_a_score_on_some_questions_says_how_many_and_how_certain() -> None:
    records = {"piqa": {"documents": 8, "questions": 1838, "higher_is_better": {"acc": True}}}
    (row,) = [row for row in rows(plain_lines(provenance={"zero_shot": {"tasks": records}})) if row[0] == "piqa acc ↑"]
    assert row == ["piqa acc ↑", "0.7500", "0.6250 ± 0.0100", "-0.1250", "8 of 1,838 questions"]


def test_a_task_that_should_fall_points_down() -> None:
    records = {"piqa": {"documents": 9, "questions": 9, "higher_is_better": {"acc": False}}}
    assert "piqa acc ↓" in plain_lines(provenance={"zero_shot": {"tasks": records}})


def test_a_method_that_betters_nothing_has_one_column_of_losses() -> None:
    block = block_of(0) | {"reconstruction_loss": {"before": 0.5, "after": 0.5}}
    head, *_ = rows(plain_lines(blocks=[block]))
    assert head[-2:] == ["all", "loss"]


def test_the_time_left_is_known_right_after_a_resume_and_within_the_first_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress_line, "time", SimpleNamespace(monotonic=lambda: 100.0))
    resumed = PruningProgress(5, [10.0, 10.0, 10.0], None, StageLine(None), print)
    assert resumed.time_left() == 20.0
    fresh = PruningProgress(5, [], 4, StageLine(None), print)
    assert fresh.time_left() is None
    fresh._began -= 10.0
    fresh.step(Step(0, 0, 0.75, 0.5, 0.25, 0.5))
    assert fresh.time_left() == pytest.approx(190.0)  # a quarter of a block in 10 s, 4.75 blocks left


def test_blocks_are_counted_from_one_after_a_resume_too() -> None:
    told: list[str] = []
    progress = PruningProgress(5, [1.0, 1.0, 1.0], None, StageLine(None), told.append)
    progress.block(BlockReport(3, (LinearReport("up_proj", 8, 4, 0.5),), 0.25, 0.25, 1.0))
    assert told[0].startswith("block 4 of 5: sparsity 0.5000, reconstruction loss 0.25, 1.0 s")


def test_blocks_are_counted_where_some_were_taken_out_whole() -> None:
    told: list[str] = []
    progress = PruningProgress(4, [1.0, 1.0, 1.0], None, StageLine(None), told.append)
    progress.block(BlockReport(4, (LinearReport("up_proj", 8, 4, 0.5),), 0.25, 0.25, 1.0))
    assert told[0].startswith("block 4 of 4 (index 4 of the dense model): sparsity 0.5000")


def test_a_terminal_of_100_columns_shows_progress_then_whole_tables() -> None:
    shown = seen_on_terminal(100)
    assert max(map(len, shown.splitlines())) <= 100
    assert re.search(r"block 2 of 2 · about .* left", shown)
    assert re.search(r"step [234] of 4 · loss 0.75", shown)  # the number of steps is known from the first block
    assert "W&B is [left] out" in shown
    assert re.search(r"  0 +40\.00 +40\.01 +40\.02 +40\.03 +40\.04 +40\.05 +40\.06 +40\.03 +0\.25 +0\.125", shown)
    assert re.search(r"perplexity embedded ↓ +10\.0000 +12\.5000 +\+25\.00%", shown)
    assert "block 1 of 2: sparsity" not in shown  # that line is for files


@pytest.mark.parametrize("no_colour", [False, True])
def test_a_narrow_terminal_breaks_no_line_and_has_colours_where_they_are_wanted(
    no_colour: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TTY_COMPATIBLE": "1", "TERM": "xterm-256color", "COLUMNS": "64", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour:
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(progress_line, "time", SimpleNamespace(monotonic=lambda: 100.0))
    with RunConsole(quiet=False) as console:
        console.outline(SETTINGS)
        with console.pruning(2, [9.0]) as progress:
            progress.step(Step(1, 0, 0.75, 0.5, 0.25, 0.5))
            assert progress.line._bars
            progress.line._bars.refresh()  # by itself it does so ten times a second
        console.stage("pruned model: zero-shot a_task_with_a_rather_long_name_of_its_own")
        console.count(64, 1838, "questions")
        console.summary(RESULTS, Path("outputs/a-run"))
    shown = capsys.readouterr().out
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "\n")
    assert max(map(len, plain.splitlines())) <= 64
    for whole in ("block 2 of 2 · about 9 s left · ", "✓ pruning (1 of 2 blocks from before)", "+25.00%"):
        assert whole in plain
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)) != no_colour


def test_a_terminal_run_logs_the_same_lines_for_run_log(caplog: pytest.LogCaptureFixture) -> None:
    with RunConsole(quiet=False) as console:
        console.stage("scoring the dense model")
        console.summary(RESULTS, Path("outputs/a-run"))
    assert "scoring the dense model" in caplog.messages
    assert any(line.startswith("| piqa acc ↑") for line in caplog.messages)


def test_what_to_do_next_depends_on_what_was_kept(tmp_path: Path) -> None:
    masks = tmp_path / "masks.safetensors"
    for moved in (True, False):  # kept weights
        save_masks({"a": torch.ones(2, 2, dtype=torch.bool)}, masks, "0" * 64, moved)
        steps = next_steps(tmp_path, {"model": "some/model"})
        rebuild = ("rebuild", f"besa masks apply {masks} --model some/model --out {tmp_path}-model")
        assert (rebuild in steps) == (not moved)
        assert steps[0] == ("compare", f"besa compare {tmp_path.parent}")
    assert [why for why, _ in next_steps(tmp_path, {"recovery": {"method": "full"}})] == ["compare", "draw"]
    (tmp_path / "model").mkdir()
    odd = tmp_path / "o [1] = 2"
    (odd / "model").mkdir(parents=True)
    (word,) = [word for word in shlex.split(next_steps(odd, {})[1][1]) if word.startswith("checkpoint=")]
    assert word == f'checkpoint="{odd}"'  # in quotes of Hydra's
    assert next_steps(tmp_path, {})[0] == ("try it", f"besa generate {tmp_path}")
    assert next_steps(tmp_path, {"zero_shot": {"piqa": {}}})[1] == ("compare", f"besa compare {tmp_path.parent}")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (200, "3 min 20 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_simulated_speed_has_a_table_that_says_it_is_not_measured():
    row = {"dense_cycles": 16.0, "sparse_cycles": 0.0, "speed_up": None, "sparsity": 1.0}
    shown = plain_lines(simulated_speed={"model": MODEL, "linears": {"mlp.up_proj": row}})
    assert "speed, simulated, not measured: ViTCoD" in shown
    assert ["mlp.up_proj", "1.0000", "16.0", "0.0", "n/a"] in rows(shown)
    assert "simulated" not in plain_lines()
