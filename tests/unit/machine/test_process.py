"""A command as a process: the collector sleeps while modules are imported, works as usual after, and the exit code is
the command's own."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_llama import tiny_llama

from besa_exp.cli.main import main
from besa_exp.machine import process

COMMAND = """
import gc
from besa_exp.machine.process import OBJECTS_WHILE_IMPORTING, imports_are_done, run_as_process

def command():
    assert gc.get_threshold()[0] == OBJECTS_WHILE_IMPORTING > usual[0]
    for _ in range(2):
        imports_are_done()
        assert gc.get_threshold() == usual
    assert gc.isenabled()
    assert gc.get_freeze_count() > 1000
    return 3

usual = gc.get_threshold()
run_as_process(command)
"""
USUAL = (701, 11, 12)


@pytest.fixture
def importing() -> Iterator[None]:
    """This process, as if it had been started as a command whose own thresholds were USUAL."""
    kept = gc.get_threshold()
    gc.set_threshold(process.OBJECTS_WHILE_IMPORTING)
    process._thresholds.append(USUAL)
    yield
    process._thresholds.clear()
    gc.set_threshold(*kept)


def test_a_process_ends_with_the_commands_code_and_collects_as_usual_once_the_imports_are_done() -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert done.stderr == ""


def test_a_terminal_without_a_character_is_no_reason_to_end() -> None:
    command = "from besa_exp.machine.process import run_as_process; run_as_process(lambda: print('\u2713 done') or 3)"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (3, "? done\n", "")


def test_in_a_process_that_is_no_command_nothing_is_changed() -> None:
    before = gc.get_threshold(), gc.get_freeze_count()
    process.imports_are_done()
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


@pytest.mark.usefixtures("importing")
@pytest.mark.parametrize("command", ["prune", "evaluate"])
def test_long_work_begins_with_the_usual_collector(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama(16, vocab_size=32, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    save_file({"input_ids": torch.randint(0, 32, (2, 8))}, tmp_path / "tokens.safetensors")
    keys = ["evaluator=perplexity", "evaluator.perplexity_sets=[tokens.safetensors]", "tracker=none", "device=cpu"]
    of_prune = ["model.path=model", "calibration.path=tokens.safetensors", "pruner=wanda", "save.verify=false"]
    assert main([command, *keys, *(of_prune if command == "prune" else ["checkpoint=model"])]) == 0
    assert gc.get_threshold() == USUAL
