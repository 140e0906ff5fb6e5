"""Work of the host that goes on beside the caller's, in a thread: one piece of it at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def one_at_a_time() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Yields a function that begins a piece of work when the one before is done. What a piece raises is raised by the
    next call, or at the end; an error of the caller's own waits for the piece under way."""
    under_way: list[Future[object]] = []

    def begin(act: Callable[[], object]) -> None:
        if under_way:
            under_way.pop().result()
        under_way.append(thread.submit(act))

    with _thread() as thread:
        yield begin
        if under_way:
            under_way.pop().result()


def ahead(make: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What is made of each item, in order; while one is out the next is made."""
    left = iter(items)
    with _thread() as thread:
        coming = [thread.submit(make, item) for item in islice(left, 1)]
        while coming:
            made = coming.pop().result()
            coming = [thread.submit(make, item) for item in islice(left, 1)]
            yield made
            del made


def _thread() -> ThreadPoolExecutor:
    """One that works on the caller's GPU. Each thread has a current one of its own, GPU 0 at first: a stream that is
    left sets it, and every rank would hold a context there."""
    if not torch.cuda.is_initialized():
        return ThreadPoolExecutor(1)
    return ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))
