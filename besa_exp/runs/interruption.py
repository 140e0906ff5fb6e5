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
    """Turns the signals into `Interrupted` where the program is, and Ctrl-C into KeyboardInterrupt as usual; after the
    first of them only Ctrl-C is heard. The handlers before are put back. Signals reach the main thread alone, so that
    elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not that of nohup, which ignores it
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for further in SIGNALS:
        signal.signal(further, signal.SIG_IGN)  # what is under way is being put away already
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)
        raise KeyboardInterrupt
    raise Interrupted(signal.Signals(number).name)
