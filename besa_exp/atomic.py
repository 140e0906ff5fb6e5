"""Files and folders that appear whole or not at all: written beside their place, made durable, then renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` (UTF-8): a reader sees the old content or the new one, never a part of either."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A place to write a file that takes the name `path` when the block ends well, and is removed when it does not."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that takes its name, and its place, when the block ends well.

    On an exception the new folder is removed and an older `path` stays as it was."""
    partial, replaced = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.replaced")
    for leftover in (partial, replaced):  # of a run that was killed
        remove(leftover)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in filter(Path.is_file, partial.rglob("*")):
            _flush(file)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        remove(replaced)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Removes a file, a link (not what it points to) or a folder with all it holds; what is absent is left so."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Waits until the file's content is on the disk, so that its new name never points to less."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
