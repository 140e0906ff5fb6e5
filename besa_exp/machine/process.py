"""A command as a process, known before torch is imported: what it is called with, which one of those of torchrun it is,
what libraries read when they are imported, how it starts and ends.

Importing torch and transformers makes a million objects that live as long as the process. Python's garbage collector
would walk all of them every few ten thousand objects while they are made, and once more when the process ends: a third
of the start-up (experiments/benchmarks/README.md). Here it rests meanwhile.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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


def set_before_imports(offline: bool) -> None:
    """What libraries read once: to be called before transformers, datasets, huggingface_hub or wandb are imported and
    before CUDA is used."""
    if offline:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
        os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", WANDB_ERROR_REPORTING="false")
        if os.environ.get("WANDB_MODE") != "disabled":
            os.environ["WANDB_MODE"] = "offline"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a forked tokenizer warns and may hang
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms on a GPU need it


@contextmanager
def command_line(words: Sequence[str]) -> Iterator[None]:
    """What Hydra and a run's status.json read as the command: sys.argv, put back afterwards."""
    saved, sys.argv = sys.argv, list(words)
    try:
        yield
    finally:
        sys.argv = saved


def is_launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_leader() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return not is_launched() or os.environ.get("RANK", "0") == "0"


def speaks_first() -> bool:
    """Whether this process is alone, or the first on its machine."""
    return not is_launched() or os.environ.get("LOCAL_RANK", "0") == "0"


def only_the_leader_speaks() -> None:
    """What the other processes print goes nowhere."""
    if not is_leader():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
