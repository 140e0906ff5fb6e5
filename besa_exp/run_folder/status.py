"""status.json of a run folder: running, done, failed with the error, or interrupted."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from besa_exp.machine import atomic
from besa_exp.machine.environment import masked_command
from besa_exp.run_folder.lock import is_locked

KILLED = "interrupted (killed)"


def read_status(path: Path) -> dict[str, Any] | None:
    """status.json (`status`, `started`, `finished`, `process`, `host`, `error`, `command`, null where there was none);
    None where no run's is."""
    status = atomic.read_json(path / "status.json")
    return status if status and {"status", "process"} <= status.keys() else None


def seen_status(path: Path) -> str | None:
    """The status as it is shown to a person. A process that was killed could not say so: its file still says running,
    but nobody has the folder locked. None: no run's folder."""
    status = read_status(path)
    if status is None:
        return None
    return KILLED if status["status"] == "running" and not is_locked(path) else str(status["status"])


def is_done(path: Path) -> bool:
    """Whether `path` holds a finished run with its results; where they are gone or damaged the run begins again."""
    status = read_status(path)
    return status is not None and status["status"] == "done" and atomic.read_json(path / "results.json") is not None


def write_status(
    path: Path, status: str, started: str, error: BaseException | None = None, words: Sequence[str] | None = None
) -> None:
    """Replaces status.json by what this process says. `words`: of the command, where that is not this process's own."""
    command = [*masked_command((own_command() if words is None else words)[1:])]
    record = {
        "status": status,
        "started": started,
        "finished": None if status == "running" else now(),
        "process": os.getpid(),
        "host": socket.gethostname(),
        "error": ": ".join(filter(None, (type(error).__name__, str(error)))) if error else None,
        "command": shlex.join(["besa", *command]) if command else None,
    }
    atomic.write_text(path / "status.json", json.dumps(record, indent=2) + "\n")


def own_command() -> list[str]:
    """The words of the `besa` command that this process is; none where a notebook or another program called."""
    return [*sys.argv] if Path(sys.argv[0]).name == "besa" else []


def now() -> str:
    """The time of day in UTC, for people to read."""
    return datetime.now(UTC).isoformat(timespec="seconds")
