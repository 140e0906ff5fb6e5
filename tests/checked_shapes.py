"""Shapes are types: every annotated function of the rooms that compute is checked at each call, once imported after
this module, in tests only."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
import torch
from jaxtyping._storage import get_shape_memo  # sizes by name, of the call that is being checked

ROOMS = ("blocks", "evaluation", "methods", "recovery", "tensors", "texts")
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
jaxtyping.install_import_hook([f"besa_exp.{room}" for room in ROOMS], "beartype.beartype")
