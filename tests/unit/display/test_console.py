"""What a run shows, on a terminal and in a plain file."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich import box
from safetensors.torch import save_file

from besa_exp.blocks.reports import BlockReport, LinearReport, Step
from besa_exp.display.console import PLAIN_WIDTH, RunConsole, duration
from besa_exp.display.tables import as_text, result_tables
from besa_exp.evaluation.simulated_speed import MODEL
from besa_exp.settings import CalibrationSettings, EvaluatorSettings, ModelSettings, RunSettings, TrackerSettings

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
import json, logging, sys, time
from pathlib import Path
from besa_exp.display.console import RunConsole
from besa_exp.blocks.reports import BlockReport, LinearReport, Step
with RunConsole() as console:
    with console.pruning(2) as progress:
        for block in range(2):
            for step in range(4):
                progress.step(Step(block, step, 0.75, 0.5, 0.25, 0.5))
                time.sleep(0.06)
            progress.block(BlockReport(block, (LinearReport("up_proj", 8, 4, 0.5),), 0.5, 0.25, 1.5))
        logging.getLogger("besa_exp.display.tracker").warning("W&B is [left] out")
    console.summary(json.loads(sys.argv[1]), Path("outputs/a-run"))
"""


def rows(text: str) -> list[list[str]]:
    """The cells of the table rows in `text`."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def plain_lines(width: int = PLAIN_WIDTH, style: box.Box = box.MARKDOWN, **changes: Any) -> str:
    return "\n".join(as_text(table, width) for table in result_tables(RESULTS | changes, width, style))


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


def test_a_plain_run_is_one_line_a_block_in_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    with RunConsole() as console, console.pruning(num_blocks=2) as progress:
        for index in range(2):
            progress.step(Step(index, 0, 0.75, 0.5, 0.25, 0.5))
            progress.block(BlockReport(index, (LinearReport("up_proj", 8, 4, 0.5),), 0.75, 0.25, 61.0))
    first, second = capsys.readouterr().out.splitlines()
    line = "block 1/2: sparsity 0.5000, reconstruction loss 0.25 (0.75 before), 1 min 01 s, about 0.0 s left"
    assert first == line
    assert second.startswith("block 2/2: ")
    assert "left" not in second
    assert first.isascii()


def test_the_plan_names_every_choice_and_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    with RunConsole(quiet=True) as console:
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
    with RunConsole(quiet=True) as console:
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
    assert head == ["block", "q", "k", "v", "o", "gate", "up", "down", "all", "before", "after"]
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
        ["perplexity embedded", "10.0000", "12.5000", "+25.00%"],
        ["perplexity ptb", "n/a", "n/a", ""],
        ["piqa acc", "0.7500", "0.6250", "-0.1250"],
    ]
    assert "n/a ptb: no network" in shown


def test_without_dense_scores_there_is_nothing_to_compare_with() -> None:
    assert rows(plain_lines(dense=None))[-3:] == [
        ["perplexity embedded", "12.5000"],
        ["perplexity ptb", "n/a"],
        ["piqa acc", "0.6250"],
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


def test_the_summary_ends_with_measured_sparsity_time_and_place(capsys: pytest.CaptureFixture[str]) -> None:
    with RunConsole(quiet=True) as console:
        console.summary(RESULTS, Path("outputs/a-run"))
    *_, measured, place = capsys.readouterr().out.splitlines()
    assert measured == "besa: measured sparsity 0.5001 (target 0.5000), 3 min 20 s"
    assert place == "run folder: outputs/a-run"


def test_a_terminal_of_100_columns_shows_progress_then_whole_tables() -> None:
    shown = seen_on_terminal(100)
    assert max(map(len, shown.splitlines())) <= 100
    assert re.search(r"blocks .* 1/2 +about .* left", shown)
    assert re.search(r"steps .* [234]/4 +block 1, loss 0.75", shown)  # the number of steps is known from block 0
    assert "W&B is [left] out" in shown
    assert re.search(r"  0 +40\.00 +40\.01 +40\.02 +40\.03 +40\.04 +40\.05 +40\.06 +40\.03 +0\.25 +0\.125", shown)
    assert re.search(r"perplexity embedded +10\.0000 +12\.5000 +\+25\.00%", shown)
    assert "block 1/2: sparsity" not in shown  # that line is for files
    assert shown.rstrip().endswith("run folder: outputs/a-run")


def test_a_terminal_run_logs_the_same_lines_for_run_log(caplog: pytest.LogCaptureFixture) -> None:
    with RunConsole(quiet=False) as console:
        console.stage("scoring the dense model")
        console.summary(RESULTS, Path("outputs/a-run"))
    assert "scoring the dense model" in caplog.messages
    assert "| piqa acc            |  0.7500 |  0.6250 |    -0.1250 |" in caplog.messages


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
