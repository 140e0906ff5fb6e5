"""One run folder holds one run at a time: the lock that says so, for as long as its process lives."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from besa_exp.errors import ConfigurationError

PATIENCE = 0.2  # seconds in which who only looks whether the folder is free has looked


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds `path/.lock`; the system frees it when the process ends, however it ends."""
    lock = path / ".lock"
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot hold a run ({error.strerror}): a run folder must be a folder that can be written to; "
            "name another with hydra.run.dir="
        ) from error
    with lock.open("r+", encoding="utf-8") as file:
        if not _taken(file, fcntl.LOCK_EX, PATIENCE):
            raise ConfigurationError(
                f"{path} is in use by {file.read().strip() or 'another process'}: one folder holds one run at a time; "
                "wait for that run, stop it, or name another folder with hydra.run.dir="
            )
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n"
        )
        file.flush()
        yield


def is_locked(path: Path) -> bool:
    """Whether a living process has a run in the folder, as far as the file system shows."""
    try:
        with (path / ".lock").open(encoding="utf-8") as file:
            return not _taken(file, fcntl.LOCK_SH, 0)
    except FileNotFoundError:
        return False
    except OSError:  # not readable, or no locks there
        return True


def _taken(file: IO[str], kind: int, patience: float) -> bool:
    """Whether the lock was taken; it is released when the file is closed."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        else:
            return True
