"""Several processes as torchrun starts them, one a device: thin functions over torch.distributed.

Calibration samples are dealt out in turn: of N ranks, rank r owns the samples r, r + N, r + 2N, ... What is summed over
samples is summed over ranks too, so that every rank sees the totals and takes the same decisions. Batches are global: a
rank computes its own samples of a batch and adds nothing where it owns none. Without torchrun, or with one process,
every function here gives back what it is given.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from besa_exp.errors import ConfigurationError, Interrupted, RunError, Unavailable

T = TypeVar("T")
# The longest that ranks wait for one of them, which may be saving a model. Failures need no time-out: torchrun
# ends all processes when one has failed.
TIMEOUT = timedelta(hours=6)
FAILURE = "besa_failure"  # the key under which the first rank to fail leaves its error
PATIENCE = 20.0  # seconds after a failure in which a rank may meet it by itself


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """The ranks are connected for as long as this lasts, gloo for CPU tensors and NCCL for CUDA's. When one fails, rank
    0 raises its error and the others exit.

    Not joined, and nothing done: where torchrun did not start this process."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    with failing_together():
        yield
    dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The device of this rank: each process of a machine has its own."""
    local = os.environ["LOCAL_RANK"] if dist.is_torchelastic_launched() else None
    return torch.device("cuda", int(local)) if device.type == "cuda" and local is not None else device


def rank() -> int:
    """The number of this process, 0 for the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is rank 0, the only one that writes."""
    return rank() == 0


def barrier() -> None:
    if num_ranks() > 1:
        total(0)  # on the CPU; dist.barrier() may leave it to a GPU


def all_sum(own: Tensor) -> Tensor:
    """The sum of the ranks' tensors, the same bits on each. Its gradient is that of the own summand alone: gradients of
    what the ranks share are for the caller to sum."""
    return own if num_ranks() == 1 else _AllSum.apply(own)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        summed = own.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient


def all_norm(own: Tensor) -> Tensor:
    """The norms of columns whose rows are dealt out, from those of the own rows."""
    return own if num_ranks() == 1 else all_sum(own.square()).sqrt()


def total(count: int) -> int:
    return int(all_sum(torch.tensor(count)))


def broadcast(tensor: Tensor) -> Tensor:
    """Overwrite a contiguous tensor with that of rank 0."""
    if num_ranks() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def gathered(value: T) -> list[T]:
    """The small objects of all ranks, by rank."""
    values: list[Any] = [value] * num_ranks()
    if num_ranks() > 1:
        dist.all_gather_object(values, value)
    return values


def end_to_end(own: Tensor) -> Tensor:
    """The vectors of all ranks, one after the other."""
    sizes = gathered(len(own))
    found = own.new_zeros(sum(sizes))
    found[sum(sizes[: rank()]) :][: len(own)] = own
    return all_sum(found)


def own_part(vectors: Tensor, count: int) -> Tensor:
    """The `count` numbers that this rank gave to `end_to_end`."""
    return vectors[sum(gathered(count)[: rank()]) :][:count]


def from_first(act: Callable[[], T]) -> T:
    """Calls `act` on rank 0 alone; every rank gets what it returns, or the Unavailable that it raises."""
    if num_ranks() == 1:
        return act()
    answer: list[Any] = [*(_tried(act) if is_first() else (None, None))]
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise Unavailable(answer[1])
    return answer[0]


def agreed(act: Callable[[], T]) -> T:
    """What `act` returns on this rank; Unavailable on all ranks if one raises it. `act` must not communicate."""
    if num_ranks() == 1:
        return act()
    result, reason = _tried(act)
    if reasons := [found for found in gathered(reason) if found is not None]:
        raise Unavailable(reasons[0])
    return result  # type: ignore[return-value]


def _tried(act: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `act` returns, or the reason why that is unavailable."""
    try:
        return act(), None
    except Unavailable as error:
        return None, str(error)


def own_samples(samples: Tensor) -> Tensor:
    """The rows of this rank, in order."""
    return samples if num_ranks() == 1 else samples[rank() :: num_ranks()].contiguous()


def own_places(numbers: Tensor) -> Tensor:
    """Positions, in what `own_samples` returns, of those samples of these `numbers` that this rank owns."""
    return numbers if num_ranks() == 1 else numbers[numbers % num_ranks() == rank()] // num_ranks()


def own_place(number: int) -> int:
    """Position, in what `own_samples` returns, of this rank's first sample from sample `number` on."""
    return -((rank() - number) // num_ranks())


def own_batches(num_own: int, batch_size: int) -> list[slice]:
    """This rank's part, which may be empty, of each batch of `batch_size` consecutive samples."""
    edges = [own_place(number) for number in range(0, total(num_own), batch_size)]
    return [slice(start, end) for start, end in pairwise([*edges, num_own])]


def own_slice(count: int) -> slice:
    """The consecutive part of a list that this rank computes; every rank has the whole list."""
    return slice(count * rank() // num_ranks(), count * (rank() + 1) // num_ranks())


@contextmanager
def failing_together(last_words: Callable[[RunError], None] | None = None) -> Iterator[None]:
    """The first rank to fail leaves its error in torchrun's store. Rank 0 raises it in the place of what it then meets
    itself; the others exit with code 1, after a message where it was their own error. May be nested.

    With `last_words` a thread looks into the store too: a rank that waits for a lost one in NCCL meets nothing, and
    hears no signal. PATIENCE later it calls them with the error on rank 0, and ends the process."""
    if num_ranks() == 1:
        yield
        return
    left = threading.Event()
    if last_words:
        threading.Thread(target=_end_when_another_fails, args=(left, last_words), daemon=True).start()
    try:
        yield
    except BaseException as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's would interrupt what is said of the failure
        failed, text = _first_failure(error)
        if is_first() and failed != 0 and not isinstance(error, (RunError, ConfigurationError, KeyboardInterrupt)):
            raise (RunError(f"rank {failed} failed: {text}") if text else Interrupted("SIGTERM")) from error
        if is_first() or isinstance(error, SystemExit | KeyboardInterrupt):
            raise
        if failed == rank():
            sys.stderr.write(f"rank {failed} failed: {text}\n")
        raise SystemExit(1) from error
    finally:
        left.set()


def _end_when_another_fails(left: threading.Event, last_words: Callable[[RunError], None]) -> None:
    """`left`: this rank has met the failure by itself, or is done."""
    with suppress(RuntimeError):  # the store is gone, with torchrun
        store = _store()
        while not left.wait(1.0):
            if store.check([FAILURE]):
                failed, text = json.loads(store.get(FAILURE))
                if not left.wait(PATIENCE):
                    if is_first():
                        last_words(RunError(f"rank {failed} failed: {text or 'it was interrupted'}"))
                    os._exit(1)


def _store() -> Any:
    """That of torchrun. RuntimeError: it is gone, with torchrun or its machine."""
    return next(rendezvous("env://", timeout=timedelta(seconds=10)))[0]


def _first_failure(error: BaseException) -> tuple[int, str]:
    """The rank that failed first, by the store that torchrun keeps, and its error; no text: it was interrupted."""
    ended = isinstance(error, (Interrupted, KeyboardInterrupt))
    known = isinstance(error, (RunError, ConfigurationError))
    text = "" if ended else str(error) if known else "".join(traceback.format_exception(error)).strip()
    try:
        failed, text = json.loads(_store().compare_set(FAILURE, "", json.dumps([rank(), text])))
    except RuntimeError:
        return rank(), text
    return failed, text
