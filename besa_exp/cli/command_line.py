"""The words of a command, as what reads sys.argv sees them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def command_line(words: Sequence[str]) -> Iterator[None]:
    """What Hydra and a run's status.json read as the command: sys.argv, put back afterwards."""
    saved, sys.argv = sys.argv, list(words)
    try:
        yield
    finally:
        sys.argv = saved
