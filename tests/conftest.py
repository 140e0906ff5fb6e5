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
from jaxtyping._storage import get_shape_memo  # sizes by name, of the call that is being checked

# Hydra composes some thirty presets for each command, most of a small run's time. The parser in C reads them alike.
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # type: ignore[misc]
whole_check = jaxtyping.jaxtyped
shapes_of_one_call: Any = whole_check("context")
whole_answer: Any = type(jaxtyping.Float[torch.Tensor, ""]).__instancecheck__


def jaxtyped(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """The decorator that the import hook gives every function and class. It checks what jaxtyping's own does: each
    argument and what is returned, sizes by one name being one within a call; but each once, where that checks arguments
    before the call and again after it, half of the tests' time. What has no shapes goes without it: pyright knows the
    other types, and six in ten calls are of this kind."""
    own = whole_check(typechecker=typechecker)

    def decorated(item: Any) -> Any:
        if inspect.isclass(item):
            if dataclasses.is_dataclass(item) and "__init__" in vars(item):
                item.__init__ = decorated(item.__init__)
            return item
        hints = {name: resolved(hint, item) for name, hint in item.__annotations__.items()}
        if not any("[Tensor" in str(hint) for hint in hints.values()):
            return item
        if inspect.isgeneratorfunction(item):
            return own(item)
        item.__annotations__ = hints
        checked = typechecker(item)

        @functools.wraps(item)
        def in_its_context(*args: Any, **kwargs: Any) -> Any:
            with shapes_of_one_call:
                return checked(*args, **kwargs)

        return in_its_context

    return decorated


@functools.cache
def plain_axes(hint: Any) -> tuple[int | str | None, ...] | None:
    """The size or name of each axis of a hint, None for one of any size (`_out`); None where there is another kind."""
    axes = hint.dim_str.split()
    if not all(axis.isidentifier() or axis.isdigit() for axis in axes):
        return None
    return tuple(int(axis) if axis.isdigit() else None if axis[0] == "_" else axis for axis in axes)


@functools.cache
def takes(hint: Any, dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype fit a plain hint."""
    with shapes_of_one_call:
        sizes = [axis if isinstance(axis, int) else 1 for axis in plain_axes(hint) or ()]
        return whole_answer(hint, torch.empty(sizes, dtype=dtype))


def fits(hint: Any, value: Any) -> bool:
    """jaxtyping's own answer, which takes twice as long where each axis has a name or a size and no more: it copies all
    sizes so that it can put a misfit into words. That was an eighth of a run of BESA in the tests."""
    axes = plain_axes(hint)
    if axes is None or not isinstance(value, torch.Tensor):
        return whole_answer(hint, value)
    if len(axes) != value.ndim or not takes(hint, value.dtype):
        return False
    known, new = get_shape_memo()[0], {}
    for axis, size in zip(axes, value.shape, strict=True):
        expected = axis if isinstance(axis, int) else known[axis] if axis in known else new.setdefault(axis, size)
        if expected != size and axis is not None:
            return False
    new.pop(None, None)
    known.update(new)
    return True


def resolved(hint: Any, function: Callable[..., Any]) -> Any:
    """The type that a hint names; Any where it names what is imported for type checkers alone."""
    try:
        return eval(hint, function.__globals__) if isinstance(hint, str) else hint
    except NameError:
        return Any


jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]
type(jaxtyping.Float[torch.Tensor, ""]).__instancecheck__ = fits  # type: ignore[method-assign]

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
