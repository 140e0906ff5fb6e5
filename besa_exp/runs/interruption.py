"""Signals that ask a run to end: what is finished is kept, the block under way is dropped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from besa_exp.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # the second is what Slurm and others send before a pre-emption


@contextmanager
def interruptible() -> Iterator[None]:
    """Turns the signals into `Interrupted` where the program is; the handlers before are put back. Signals reach the
    main thread alone, so that elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for further in SIGNALS:
        signal.signal(further, signal.SIG_IGN)  # what is under way is being put away already
    raise Interrupted(signal.Signals(number).name)
