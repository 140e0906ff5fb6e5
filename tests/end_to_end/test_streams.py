"""Standard output that goes away, and Ctrl-C: the work is done or kept, nothing is shown but what a person can use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

BESA = [sys.executable, "-m", "besa_exp"]
TRACES = ("Traceback", "Logging error", "Exception ignored", "BrokenPipe")


def status_of_the_run() -> str:
    (file,) = Path("outputs").glob("*/status.json")
    return json.loads(file.read_text())["status"]


def head(command: list[str]) -> tuple[int, str, str]:
    """`command | head -1`: exit code, the line, and what stood on stderr."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        errors = process.stderr.read()
    return process.wait(), line, errors


def test_a_run_whose_reader_has_gone_is_finished_without_a_word(given: list[str]) -> None:
    code, line, errors = head([*BESA, "prune", *given])
    assert (code, status_of_the_run()) == (0, "done")
    assert line.startswith("besa ")
    assert not [word for word in TRACES if word in errors]


@pytest.mark.parametrize("place", ["/dev/full", "closed"])
def test_a_run_whose_output_cannot_be_written_is_finished(place: str, given: list[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    script = 'exec "$@" >&-' if place == "closed" else 'exec "$@" >/dev/full'
    done = subprocess.run(["sh", "-c", script, "sh", *BESA, "prune", *given], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, status_of_the_run()) == (0, "done")
    assert not [word for word in TRACES if word in done.stderr]
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
    command = [*BESA, "prune", "-m", *given, "seed=0,1", "pruner=besa", "pruner.epochs=500"]
    command.remove("pruner=magnitude")
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 # a background job ignores it
    )
    deadline = time.monotonic() + 300
    while not list(Path("outputs").glob("*/blocks/000000.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert not [word for word in TRACES if word in output + errors]
    assert errors.splitlines()[-1] == "besa: interrupted; the same command goes on after what is finished"
    assert status_of_the_run() == "interrupted"
    (log,) = Path("outputs").glob("*/run.log")
    assert "the run was interrupted" in log.read_text()
    assert "Traceback" not in log.read_text()
