"""How much is reconstructed together, under one loss and one budget: a part of a block, a block, two of them, or, after
each block by itself, the whole model (`besa_exp.blocks.pruner.Refinement`).

To a pruner the first three are a `Block`, which maps hidden states to hidden states and has linears. A sub-block ends
where the residual stream passes from attention to MLP. That place is found, not listed by family: we look for a module
input that cuts the autograd graph between the block's input and output in two, with linears before and after it. Blocks
whose attention and MLP work side by side (GPT-J, GPT-NeoX, Falcon, Phi) have no such place, and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.call_arguments import Reached, hidden_of
from besa_exp.blocks.linears import find_linears
from besa_exp.blocks.pruner import PrunedBlock
from besa_exp.blocks.reports import BlockReport
from besa_exp.blocks.whole_model import Found
from besa_exp.errors import RunError

T = TypeVar("T")
SCOPES = ("sub_block", "block", "pair", "model")


def unit_ends(num_blocks: int, together: int) -> set[int]:
    """The numbers of finished blocks at which no unit of `together` blocks is cut in two."""
    return {*range(0, num_blocks, together), num_blocks}


def units(blocks: Sequence[Block], together: int) -> list[Block]:
    """The blocks, `together` at a time; what is left over at the end comes as it is."""
    return [_chained(blocks[start : start + together]) for start in range(0, len(blocks), together)]


def with_linears(blocks: Sequence[Block]) -> list[Block]:
    """The blocks, those without linears chained to the one before that has some (the first ones: to the next)."""
    groups: list[list[Block]] = [[]]
    for block in blocks:
        if block.linears and any(other.linears for other in groups[-1]):
            groups.append([])
        groups[-1].append(block)
    return [_chained(group) for group in groups]


def of_unit(unit: Block, of_block: Callable[[Block], Mapping[str, T]]) -> Mapping[str, T]:
    """What is known of the linears of each of its blocks, by their names in the unit."""
    if not unit.parts:
        return of_block(unit)
    parts = enumerate(unit.parts)
    return {f"{place}.{name}": value for place, part in parts for name, value in of_block(part).items()}


def found_of_blocks(unit: Block, found: Found) -> list[Found]:
    """Of each of its blocks, from what is found of the unit."""

    def own(make: Callable[[], Mapping[str, Tensor]], place: int) -> Callable[[], Mapping[str, Tensor]]:
        return lambda: _own(make(), place)

    places = range(len(unit.parts))
    return [Found(own(found.keep_masks, p), found.weights and own(found.weights, p)) for p in places] or [found]


def _chained(blocks: Sequence[Block]) -> Block:
    """One block that runs several, one after the other; its linears are `0.self_attn.q_proj`, `1.self_attn.q_proj`. A
    single one is itself."""
    if len(blocks) == 1:
        return blocks[0]
    return Block(
        blocks[0].index,
        " and ".join(block.name for block in blocks),
        _Chain(block.module for block in blocks),
        {
            f"{place}.{name}": replace(linear, path=f"{place}.{linear.path}")
            for place, block in enumerate(blocks)
            for name, linear in block.linears.items()
        },
        lambda batch_size: (tuple(block.arguments(batch_size) for block in blocks), {}),
        tuple(blocks),
        blocks[0].compute_dtype,
    )


class _Chain(nn.ModuleList):
    """Each module with its own captured arguments."""

    def forward(self, hidden: Hidden, *arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Hidden:
        for module, (args, kwargs) in zip(self, arguments, strict=True):
            hidden = hidden_of(module(hidden, *args, **kwargs))
        return hidden


def by_block(unit: Block, report: BlockReport, pruned: PrunedBlock) -> list[tuple[Block, BlockReport, PrunedBlock]]:
    """What was decided of a unit, block by block. The losses are the unit's; its time is split evenly, and its steps
    are reported with its first block."""
    if not unit.parts:
        return [(unit, report, pruned)]
    result = []
    for place, block in enumerate(unit.parts):
        linears = tuple(
            replace(linear, name=linear.name.removeprefix(f"{place}."))
            for linear in report.linears
            if linear.name.startswith(f"{place}.")
        )
        own = replace(
            pruned,
            keep_masks=_own(pruned.keep_masks, place),
            allocated=_own(pruned.allocated, place),
            weights=None if pruned.weights is None else _own(pruned.weights, place),
            norms=_own(pruned.norms, place),
            permutations=_own(pruned.permutations, place),
        )
        steps, seconds = () if place else report.steps, report.seconds / len(unit.parts)
        result.append((block, replace(report, index=block.index, linears=linears, seconds=seconds, steps=steps), own))
    return result


def _own(values: Mapping[str, T], place: int) -> dict[str, T]:
    prefix = f"{place}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def sub_blocks(block: Block, inputs: Hidden) -> list[tuple[Block, tuple[str, ...]]]:
    """Attention and MLP apart: each a block from the block's inputs to its own end, with all linears, and the names of
    its own. `inputs`: one sample shows where they part. RunError: there is no such place."""
    seen, output = _watch(block, inputs[:1])
    first_calls = {id(module): place for place, (module, _) in reversed([*enumerate(seen)])}
    called = {name: _call_of(block.module, name, first_calls) for name in find_linears(block.module)}
    parts: list[tuple[Block, tuple[str, ...]]] = []
    begin, last = 0, seen[0][1]
    for place, (module, state) in enumerate(seen):
        names = tuple(name for name, call in called.items() if begin <= call < place)
        after = any(call >= place for call in called.values())
        if names and after and state is not last and _holds_all(state, seen[0][1], output):
            parts.append((replace(block, module=_Until(block.module, module)), names))
            begin, last = place, state
    if not parts:
        raise RunError(
            f"{block.name}: attention and MLP cannot be reconstructed apart: no state between them holds all of the "
            "block's input, as in blocks that run them side by side; use pruner.scope=block"
        )
    parts.append((block, tuple(name for name, call in called.items() if call >= begin)))
    own = [(part, tuple(name for name in names if name in block.linears)) for part, names in parts]
    return [(part, names) for part, names in own if names]  # what is ignored is in no part


class _Until(nn.Module):
    """A block up to the first call of `end`: what that is given. Its submodules are the block's, under their names."""

    def __init__(self, block: nn.Module, end: nn.Module) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.block_and_end = (block, end)  # in a tuple: else they would be submodules, with names of their own

    def forward(self, hidden: Hidden, *args: Any, **kwargs: Any) -> Hidden:
        """The state in the shape of the hidden states."""
        block, end = self.block_and_end
        states: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(_given(args, kwargs))
            raise Reached

        with end.register_forward_pre_hook(catch, with_kwargs=True), suppress(Reached):
            block(hidden, *args, **kwargs)
        return states[0].reshape(hidden.shape)


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _watch(block: Block, sample: Hidden) -> tuple[list[tuple[nn.Module, Tensor | None]], Tensor]:
    """The calls of all modules in order, the block itself first, with what they were given, and the output; all part of
    one graph."""
    block.arguments(len(sample))  # captured by a pass of the model, which must not meet the hooks
    seen: list[tuple[nn.Module, Tensor | None]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((module, _given(args, kwargs)))

    with ExitStack() as hooks, torch.enable_grad():
        for module in block.module.modules():
            hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
        output = block(sample.detach().clone().requires_grad_())
    return seen, output


def _call_of(module: nn.Module, name: str, first_calls: Mapping[int, int]) -> int:
    """When a linear was first called, or, where it was not (an expert that no token reached), what holds it."""
    while name:
        with suppress(AttributeError):
            if (call := first_calls.get(id(module.get_submodule(name)))) is not None:
                return call
        name = name.rpartition(".")[0]
    return 0


def _holds_all(state: Tensor | None, entered: Tensor | None, output: Tensor) -> bool:
    """Whether every way back from `output` to `entered` in autograd's graph leads through `state`."""
    if state is None or state.grad_fn is None or entered is None or state.numel() != entered.numel():
        return False
    passed = {(state.grad_fn, state.output_nr)}
    ahead = [(output.grad_fn, output.output_nr)]
    while ahead:
        node, number = ahead.pop()
        if node is None or (node, number) in passed:
            continue
        passed.add((node, number))
        if getattr(node, "variable", None) is entered:
            return False
        ahead += node.next_functions
    return True
