"""What every test relies on: no network, one thread a worker, and where the shared data may be."""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read by the libraries when they are imported, so set before any test module is.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that wait for each other sleep: the cores are shared
os.environ.pop("HYDRA_FULL_ERROR", None)

import jaxtyping
import pytest
import torch
import yaml

# Hydra composes some thirty presets for each command, most of a small run's time. The parser in C reads them alike.
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # type: ignore[misc]
whole_check = jaxtyping.jaxtyped
shapes_of_one_call: Any = whole_check("context")


def jaxtyped(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """The decorator that the import hook gives every function and class. It checks what jaxtyping's own does: each
    argument and what is returned, sizes by one name being one within a call; but each once, where that checks arguments
    before the call and again after it, half of the tests' time. Inner functions without shapes go without it: they
    would have a check compiled each time that the outer one is called."""
    own = whole_check(typechecker=typechecker)

    def decorated(item: Any) -> Any:
        if inspect.isclass(item):
            if dataclasses.is_dataclass(item) and "__init__" in vars(item):
                item.__init__ = decorated(item.__init__)
            return item
        if inspect.isgeneratorfunction(item):
            return own(item)
        shapes = any("[Tensor" in str(hint) for hint in item.__annotations__.values())
        if "<locals>" in item.__qualname__ and not shapes:
            return item
        item.__annotations__ = {name: resolved(hint, item) for name, hint in item.__annotations__.items()}
        checked = typechecker(item)

        @functools.wraps(item)
        def in_its_context(*args: Any, **kwargs: Any) -> Any:
            with shapes_of_one_call:
                return checked(*args, **kwargs)

        return in_its_context

    return decorated


def resolved(hint: Any, function: Callable[..., Any]) -> Any:
    """The type that a hint names; Any where it names what is imported for type checkers alone."""
    try:
        return eval(hint, function.__globals__) if isinstance(hint, str) else hint
    except NameError:
        return Any


jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]

# Shapes are types: every annotated function of these rooms is checked at each call, in tests only.
ROOMS = ("blocks", "evaluation", "methods", "recovery", "tensors", "texts")  # those that compute
jaxtyping.install_import_hook([f"besa_exp.{room}" for room in ROOMS], "beartype.beartype")

ROOT = Path(__file__).parents[1]
SHARED_DIR = Path(os.environ.get("BESA_SHARED", ROOT.parent / "shared"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"  # so do the processes that tests start, whose bytes are compared


def pytest_configure() -> None:
    """Modules and tests stay for as long as the process: the collector need not walk them; see
    besa_exp/machine/process.py."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # Hypothesis asks the collector who holds what


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of golden files, models and data that are not part of the project; BESA_SHARED names it."""
    if not SHARED_DIR.is_dir():
        pytest.skip(f"{SHARED_DIR} is not there; BESA_SHARED names the folder with golden/, models/ and data/")
    return SHARED_DIR
