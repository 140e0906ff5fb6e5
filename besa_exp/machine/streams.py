"""Standard streams that may go away: a reader that has seen enough (`| head -1`), a full disk, a stream closed before.

What a run says also stands in its run.log, so that its work goes on: the first line that cannot be written is the last
that is tried, and a character that a stream's encoding does not have becomes a question mark. A stream that was closed
before the program began is /dev/null, else the next file to be opened would take its place and get what others print.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO

READER_HAS_GONE = 141  # the exit code of a program that SIGPIPE ended


class LastingStream(io.TextIOWrapper):
    """Writes until a write fails, then discards everything; `lost` is the reason."""

    lost: OSError | None = None

    def write(self, text: str) -> int:
        """The number of characters, as if they had been written."""
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        super().flush()  # what is still held


def keep_streams() -> None:
    """Replaces this process's own standard streams by lasting ones; streams of a test or a notebook stay."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream, own = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None:
            kept = LastingStream(os.fdopen(number, "wb", closefd=False), encoding="utf-8")
        elif stream is own and isinstance(stream, io.TextIOWrapper) and not isinstance(stream, LastingStream):
            keys = {"encoding": stream.encoding, "errors": "replace" if stream.errors == "strict" else stream.errors}
            buffered = stream.line_buffering
            kept = LastingStream(stream.detach(), line_buffering=buffered, **keys)
        else:
            continue
        setattr(sys, name, kept)
        setattr(sys, f"__{name}__", kept)


def exit_code_of(stream: TextIO, code: int) -> int:
    """The exit code of a command whose only work is its output: not 0 where the output could not be written."""
    with suppress(BrokenPipeError):
        stream.flush()
    lost = getattr(stream, "lost", None)
    if code or lost is None:
        return code
    if isinstance(lost, BrokenPipeError):
        return READER_HAS_GONE
    sys.stderr.write(f"besa: standard output cannot be written ({lost.strerror})\n")
    return 1
