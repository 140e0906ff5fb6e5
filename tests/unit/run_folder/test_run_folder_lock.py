"""One folder holds one run at a time, for as long as its process lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from besa_exp.errors import ConfigurationError
from besa_exp.run_folder.folder import RunFolder
from besa_exp.run_folder.lock import is_locked
from besa_exp.run_folder.status import is_done, read_status, seen_status

ROOT = Path(__file__).parents[3]
HOLDER = """
import sys
from pathlib import Path
from besa_exp.run_folder.folder import RunFolder
with RunFolder.open(Path(sys.argv[1])) as folder:
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process with a run in `tmp_path`/run."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_a_second_process_in_the_folder_is_told_who_holds_it(tmp_path: Path, other_run: subprocess.Popen[str]) -> None:
    status = (tmp_path / "run" / "status.json").read_bytes()
    match = rf"run is in use by process {other_run.pid} on .*one folder holds one run.*hydra\.run\.dir="
    with pytest.raises(ConfigurationError, match=match), RunFolder.open(tmp_path / "run", overwrite=True):
        pass
    assert (tmp_path / "run" / "status.json").read_bytes() == status


def test_a_killed_run_is_told_from_one_that_runs(tmp_path: Path, other_run: subprocess.Popen[str]) -> None:
    assert seen_status(tmp_path / "run") == "running"
    os.kill(other_run.pid, signal.SIGKILL)
    other_run.wait()
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status["status"] == "running", "a killed process could not say anything else"
    assert seen_status(tmp_path / "run") == "interrupted (killed)"
    assert seen_status(tmp_path) is None
    with RunFolder.open(tmp_path / "run") as folder:
        assert seen_status(tmp_path / "run") == "running"
        folder.write_results({})
    assert seen_status(tmp_path / "run") == "done"
    log = (tmp_path / "run" / "run.log").read_text()
    assert f"the attempt of process {other_run.pid}, begun {status['started']}, was killed" in log


def test_who_looks_at_a_free_folder_does_not_keep_a_run_from_it(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "run") as folder:
        folder.write_results({})
    stop = threading.Event()
    watching = threading.Thread(target=lambda: [is_locked(tmp_path / "run") for _ in iter(stop.is_set, True)])
    watching.start()
    try:
        for _ in range(20):
            with RunFolder.open(tmp_path / "run", overwrite=True):
                assert is_locked(tmp_path / "run")
    finally:
        stop.set()
        watching.join()


def test_a_killed_run_frees_its_folder_and_the_next_starts_over(
    tmp_path: Path, other_run: subprocess.Popen[str]
) -> None:
    (tmp_path / "run" / "metrics.jsonl").write_text("half a li")
    (tmp_path / "run" / ".model.partial").mkdir()
    os.kill(other_run.pid, signal.SIGKILL)
    other_run.wait()
    with RunFolder.open(tmp_path / "run") as folder:
        folder.write_results({})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / ".model.partial").exists()
    assert is_done(tmp_path / "run")


def test_a_folder_is_free_again_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fail_run(tmp_path)
    with RunFolder.open(tmp_path):
        status = read_status(tmp_path)
    assert status is not None
    assert status["status"] == "running"


def fail_run(path: Path) -> None:
    with RunFolder.open(path):
        raise KeyError
