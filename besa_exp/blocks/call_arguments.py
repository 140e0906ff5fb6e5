"""What a model calls its decoder blocks with, captured while stand-ins take the blocks' place: no block computes.

A block is called on its own with what was captured from other samples of the same shape. That is right only where
these arguments depend on nothing but the shape, which is checked: they are captured a second time from other tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from besa_exp.blocks.linears import replaced_forwards
from besa_exp.errors import RunError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional ones after the hidden states, and all keyword arguments
TokenIds = Int[Tensor, "sample seq"]


class Reached(Exception):
    """Ends a forward pass as soon as the captured block is reached."""


class NotAlone(RunError):
    """The blocks of a model cannot be called on their own."""


class _Returned:
    """Stands in for what a block returns beside its hidden states."""


def hidden_of(output: Any) -> Tensor:
    """The hidden states of what a block returned: that, or the first of several."""
    return output[0] if isinstance(output, tuple | list) else output


def arguments_of_the_shape(model: nn.Module, modules: list[nn.Module], input_ids: TokenIds) -> list[Arguments]:
    """The arguments of each block, for any samples of this shape. NotAlone: they are not the same for all, or a block
    needs more than them and hidden states."""
    found = captured_arguments(model, modules, input_ids)
    others = captured_arguments(model, modules, other_tokens(model, input_ids))
    if place := difference(modules[0], found, others):
        raise NotAlone(
            f"{type(model).__name__} gives its blocks {place}, which depends on the tokens. Pruning calls each block "
            "on its own and repeats only arguments that depend on the shape; this model can be scored but not pruned"
        )
    return found


def check_unwritten(model: nn.Module, modules: list[nn.Module], input_ids: TokenIds, used: Sequence[Arguments]) -> None:
    """NotAlone: the blocks have written into the arguments that they were called with, as those do that share keys and
    values. `used`: those of the first blocks or all, captured from tokens of this shape."""
    now = captured_arguments(model, modules, input_ids)[: len(used)]
    if place := difference(modules[0], now, used):
        raise NotAlone(
            f"the blocks of {type(model).__name__} hand on more than hidden states: they write into {place}, which "
            "later blocks read. Pruning calls each block on its own; this model can be scored but not pruned"
        )


def other_tokens(model: Any, input_ids: TokenIds) -> TokenIds:
    """Ids of the same shape that differ in each place, special ones among them."""
    config = model.config.get_text_config()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    ids = [one for name in names for one in _listed(getattr(config, name, None)) if 0 <= one < vocabulary]
    others = (input_ids + 1) % vocabulary
    special = torch.tensor(ids, dtype=others.dtype, device=others.device)
    count = min(len(ids), others.shape[1] // 2)  # the rest are usual ones
    first = special[:count].expand(len(others), count)
    others[:, :count] = torch.where(first == input_ids[:, :count], others[:, :count], first)
    return others


def _listed(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


@torch.no_grad()
def captured_arguments(model: nn.Module, modules: list[nn.Module], input_ids: TokenIds) -> list[Arguments]:
    """The arguments of each block when the model is given `input_ids`. The stand-ins hand on the hidden states in a
    tuple, as some blocks do and most models pass on unseen; where the model does not, as a tensor.

    NotAlone: the model does more with what its blocks return, or its states are not [sample, seq, hidden]."""
    found, refused = None, None
    for result in (lambda hidden: (hidden, _Returned()), lambda hidden: hidden):
        try:
            found = _captured(model, modules, input_ids, result)
            break
        except (NotAlone, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever the model's own code says
            refused = error
    if found is None:
        raise NotAlone(
            f"{type(model).__name__} does more with what its blocks return than hand on hidden states "
            f"({type(refused).__name__}: {refused}). Pruning calls each block on its own; this model can be scored but "
            "not pruned"
        ) from refused
    for name in (name for arguments in found for name, value in _named(modules[0], arguments).items() if _holds(value)):
        raise NotAlone(
            f"the blocks of {type(model).__name__} hand on more than hidden states ({name}). Pruning calls each block "
            "on its own; this model can be scored but not pruned"
        )
    return found


def _captured(
    model: nn.Module, modules: list[nn.Module], input_ids: Tensor, result: Callable[[Any], Any]
) -> list[Arguments]:
    seen: list[Arguments] = []

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        hidden = hidden_of(kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0])
        check_states(model, hidden, input_ids)
        seen.append((args[1:], kwargs))
        if len(seen) == len(modules):
            raise Reached
        return result(hidden)

    with replaced_forwards(modules, [stand_in] * len(modules)), suppress(Reached):
        model(input_ids.to(next(model.parameters()).device), use_cache=False)
    if len(seen) != len(modules):
        raise NotAlone(
            f"{type(model).__name__}: {len(modules)} blocks of {type(modules[0]).__name__} were found, but "
            f"{len(seen)} calls were seen: some blocks are skipped or called again. Only a decoder that calls each "
            "block once can be pruned"
        )
    return seen


def check_states(model: nn.Module, hidden: Any, input_ids: TokenIds) -> None:
    """NotAlone: the states that enter a block are not [sample, seq, hidden]."""
    shape = tuple(getattr(hidden, "shape", ()))
    if len(shape) != 3 or shape[:2] != tuple(input_ids.shape):
        raise NotAlone(
            f"the states between the blocks of {type(model).__name__} have the shape {list(shape)} for "
            f"{list(input_ids.shape)} tokens, but pruning gives blocks [sample, seq, hidden]; this model can be scored "
            "but not pruned"
        )


def difference(block: nn.Module, one: Sequence[Arguments], other: Sequence[Arguments]) -> str | None:
    """The name of what differs first in the arguments that blocks like this got in two passes; None: nothing does."""
    for arguments, others in zip(one, other, strict=True):
        others_named = _named(block, others)
        for name, value in _named(block, arguments).items():
            if not _same(value, others_named.get(name)):
                return name
    return None


def _named(block: nn.Module, arguments: Arguments) -> dict[str, Any]:
    """The arguments by the names that the block's code has for them."""
    args, kwargs = arguments
    names = [*inspect.signature(type(block).forward).parameters][2:]  # after self and the hidden states
    names += [f"argument {number}" for number in range(len(names) + 2, len(args) + 2)]
    return dict(zip(names, args, strict=False)) | kwargs


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments hold the same numbers. Functions are made again by each pass, and compare as equal."""
    if one is other:
        return True
    if isinstance(one, Tensor):
        alike = isinstance(other, Tensor) and (one.shape, one.dtype) == (other.shape, other.dtype)
        return alike and bool(((one == other) | ((one != one) & (other != other))).all())
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    return callable(one) or (_same(vars(one), vars(other)) if hasattr(one, "__dict__") else bool(one == other))


def _holds(value: Any) -> bool:
    """Whether an argument is, or holds, what a block returned."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, _Returned) or any(map(_holds, inner))
