"""Work beside the caller's: in order, one piece at a time, and what fails there fails here."""

from __future__ import annotations

import threading

import pytest
import torch

from besa_exp.machine.background import ahead, one_at_a_time


def test_a_piece_of_work_begins_when_the_one_before_is_done_and_runs_beside_the_caller():
    may_end, done = threading.Event(), []
    with one_at_a_time() as begin:
        begin(lambda: (may_end.wait(10), done.append("first")))
        assert not done
        threading.Timer(0.05, may_end.set).start()
        begin(lambda: done.append("second"))  # which waits
        assert done[0] == "first"
    assert done == ["first", "second"]


def failing():
    raise OSError("the disk is full")


def begun(pieces):
    with one_at_a_time() as begin:
        for piece in pieces:
            begin(piece)


def test_what_fails_beside_the_caller_is_raised_by_the_next_piece_or_at_the_end():
    reached = []
    with pytest.raises(OSError, match="the disk is full"):
        begun([failing, lambda: reached.append("after a failure")])
    with pytest.raises(OSError, match="the disk is full"):
        begun([lambda: reached.append("before"), failing])
    assert reached == ["before"]


def test_an_error_of_the_callers_own_waits_for_what_is_under_way():
    done = threading.Event()

    def pieces():
        yield lambda: done.wait(0.05) or done.set()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        begun(pieces())
    assert done.is_set()


def test_one_item_is_made_ahead_in_a_thread_of_its_own_and_no_more():
    made = []

    def make(item):
        made.append(threading.current_thread())
        return item * 10

    coming = ahead(make, iter(range(5)))
    assert next(coming) == 0
    assert next(coming) == 10
    assert len(made) in (2, 3)
    assert [*coming] == [20, 30, 40]
    assert threading.current_thread() not in made


def test_what_is_made_ahead_fails_when_it_is_asked_for():
    coming = ahead(lambda item: 1 / item, [2, 1, 0])
    assert [next(coming), next(coming)] == [0.5, 1]
    with pytest.raises(ZeroDivisionError):
        next(coming)


def test_the_thread_works_on_the_callers_gpu(monkeypatch):
    set_there = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: set_there.append((index, threading.get_ident())))
    begun([lambda: None])
    assert [*ahead(str, [1, 2])] == ["1", "2"]
    assert [index for index, _ in set_there] == [3, 3]
    assert threading.get_ident() not in [thread for _, thread in set_there]
