"""Files and folders that appear whole or not at all: written beside their place, made durable, then renamed into it.

Every file has the mode that the umask gives: safetensors makes its own 0600, which nobody else could read.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from besa_exp.errors import RunError


@contextmanager
def writing(what: str, remedy: str) -> Iterator[None]:
    """RunError: the disk is full or cannot be written to. `what` could not be written, and where, begins the sentence
    that `remedy` ends."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"{what} ({error}); {remedy}") from error


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` (UTF-8): a reader sees the old content or the new one, never a part of either."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None: there is no file, or a damaged one. RunError: it may not be read, or the disk
    fails."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); make it readable, or move it away") from error
    return found if isinstance(found, dict) else None


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields a place to write a file. It becomes `path` when the block ends without an error, else it is removed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # of a run that was killed
    try:
        mode = _mode_of_new(partial)
        yield partial
        _finish(partial, mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `path` when the block ends without an error.

    On an exception the new folder is removed and an older `path` stays as it was."""
    partial, replaced = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.replaced")
    _put_back(replaced, path)
    for leftover in (partial, replaced):  # of a run that was killed
        remove(leftover)
    partial.mkdir(parents=True)
    try:
        mode = _mode_of_new(partial / ".mode")
        (partial / ".mode").unlink()
        yield partial
        for file in filter(Path.is_file, partial.rglob("*")):
            _finish(file, mode)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        remove(replaced)
    finally:
        _put_back(replaced, path)
        remove(partial)


def _put_back(replaced: Path, path: Path) -> None:
    """The older folder, where nothing stands in its place: the process was killed, or failed, between two renames."""
    if replaced.exists() and not path.exists():
        replaced.rename(path)


@contextmanager
def alone(lock: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds `lock`; the system frees it when the process ends. Where there can be no lock, nobody waits."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError:
        yield
        return
    with file:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove(path: Path) -> None:
    """Removes a file, a link (not what it points to) or a folder with its content; does nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _mode_of_new(path: Path) -> int:
    """The mode of the file that is made there, by the umask and what the folder says."""
    path.touch(exist_ok=False)
    return path.stat().st_mode


def _finish(path: Path, mode: int) -> None:
    """Gives the file the mode and waits until its content is on the disk, so that its new name never points to less."""
    with path.open("rb") as file:
        if path.stat().st_mode != mode:
            with suppress(PermissionError):  # a file system without modes
                path.chmod(stat.S_IMODE(mode))
        os.fsync(file.fileno())
