"""Signals that ask a run to end, one after the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from besa_exp.errors import Interrupted
from besa_exp.runs.interruption import interruptible


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C as a terminal's command has it, however the tests were started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def end(first: str, then: str, put_away: list[bool]) -> None:
    """Work that gets the `first` signal, and the other one while it puts things away."""
    with interruptible():
        try:
            os.kill(os.getpid(), getattr(signal, first))
        finally:
            os.kill(os.getpid(), getattr(signal, then))
            put_away.append(True)


@pytest.mark.parametrize(("first", "raised"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", Interrupted)])
def test_what_is_put_away_after_a_signal_is_not_cut_off_by_the_next(first: str, raised: type[BaseException]) -> None:
    put_away: list[bool] = []
    with pytest.raises(raised):
        end(first, then="SIGTERM", put_away=put_away)
    assert put_away
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ctrl_c_is_heard_again_and_where_it_is_ignored_it_stays_so() -> None:
    put_away: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        end("SIGTERM", then="SIGINT", put_away=put_away)
    assert not put_away
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible():
        os.kill(os.getpid(), signal.SIGINT)
