"""One run folder holds one run at a time: the lock that says so, for as long as its process lives."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from besa_exp.errors import ConfigurationError
from besa_exp.run_status import now


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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"{path} is in use by {file.read().strip() or 'another process'}: one folder holds one run at a time; "
                "wait for that run, stop it, or name another folder with hydra.run.dir="
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now()}\n")
        file.flush()
        yield
