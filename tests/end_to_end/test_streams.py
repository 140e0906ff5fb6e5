"""Standard output that goes away, and Ctrl-C: the work is done or kept, nothing is shown but what a person can use. End
to end because streams and signals are a process's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ready_process
from ready_process import run_ready, start_ready

BESA = [sys.executable, "-m", "besa_exp"]
TRACES = ("Traceback", "Logging error", "Exception ignored", "BrokenPipe")


def status_of_the_run() -> str:
    (file,) = Path("outputs").glob("*/status.json")
    return json.loads(file.read_text())["status"]


def test_a_run_whose_reader_has_gone_is_finished_without_a_word(given: list[str], tmp_path: Path) -> None:
    """`besa prune ... | head -1`."""
    os.mkfifo(pipe := tmp_path / "pipe")
    run = start_ready(ready_process.BESA, "prune", *given, output=str(pipe))
    with pipe.open() as reader:
        line = reader.readline()
    ended = run.wait()
    assert (ended.returncode, status_of_the_run()) == (0, "done")
    assert line.startswith("besa ")
    assert not [word for word in TRACES if word in ended.stdout]


@pytest.mark.parametrize("place", ["/dev/full", "closed"])
def test_a_run_whose_output_cannot_be_written_is_finished(place: str, given: list[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    if place == "closed":  # an interpreter that starts so has none
        told = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *BESA, "--version"], stderr=subprocess.PIPE)
        assert (told.returncode, told.stderr) == (0, b"")
    done = run_ready(ready_process.BESA, "prune", *given, output=place)
    assert (done.returncode, status_of_the_run()) == (0, "done")
    assert not [word for word in TRACES if word in done.stdout]
    (log,) = Path("outputs").glob("*/run.log")
    assert "loading" in log.read_text()


def test_a_command_that_only_tells_says_by_its_exit_code_that_nobody_took_it() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*BESA, "--version"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "besa: standard output cannot be written (No space left on device)\n")
    reading, writing = os.pipe()
    os.close(reading)
    gone = subprocess.run([*BESA, "--version"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (gone.returncode, gone.stderr) == (141, "")


def test_ctrl_c_in_a_sweep_ends_it_quietly_and_keeps_what_is_finished(given: list[str]) -> None:
    words = ["prune", "-m", *given, "seed=0,1", "pruner=besa", "pruner.epochs=100"]
    words.remove("pruner=magnitude")
    sweep = start_ready(ready_process.BESA, *words)
    deadline = time.monotonic() + ready_process.TIMEOUT
    while not list(Path("outputs").glob("*/blocks/000000.json")):
        assert not sweep.ended(), sweep.wait()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does it
    ended = sweep.wait()
    assert ended.returncode == 130
    assert not [word for word in TRACES if word in ended.stdout]
    assert "besa: interrupted; run the same command again to resume\n" in ended.stdout
    assert status_of_the_run() == "interrupted"
    (log,) = Path("outputs").glob("*/run.log")
    assert "the run was interrupted" in log.read_text()
    assert "Traceback" not in log.read_text()
