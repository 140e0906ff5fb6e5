"""A command as a process of its own, which starts and ends without walking its modules over and over.

Importing torch and transformers makes a million objects that live as long as the process. Python's garbage collector
would walk all of them every few ten thousand objects while they are made, and once more when the process ends: a third
of the start-up (experiments/benchmarks/README.md).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import NoReturn

from besa_exp.machine.streams import keep_streams

OBJECTS_WHILE_IMPORTING = 50_000  # made between two collections of the youngest; Python's own is 700 to 2000
_thresholds: list[tuple[int, int, int]] = []  # Python's own, while others hold


def run_as_process(command: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit code of `command`, which calls `imports_are_done` before its long work. Its
    standard streams may close before it ends."""
    keep_streams()
    _thresholds.append(gc.get_threshold())
    gc.set_threshold(OBJECTS_WHILE_IMPORTING)
    code = command()
    gc.freeze()
    sys.exit(code)


def imports_are_done() -> None:
    """The collector works as usual from here on, except for existing objects. Does nothing in a process that did not
    begin with `run_as_process`: a notebook's or a test's objects are left alone."""
    if _thresholds:
        gc.freeze()
        gc.set_threshold(*_thresholds.pop())
