"""Whether what a method makes of a block is what was asked of it. Told in a sentence, before a weight is written: what
is of another shape, unit or pattern would else be spread, rounded or reported without a word."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from besa_exp.blocks.block import Block
from besa_exp.blocks.observation import check_tensor
from besa_exp.blocks.pruner import PrunedBlock
from besa_exp.blocks.reports import Step
from besa_exp.errors import RunError
from besa_exp.tensors.masks import Goal

ROUNDING = 1e-6  # of a sparsity in fp32


@contextmanager
def untouched(block: Block) -> Iterator[None]:
    """RunError at the end: a parameter of the block was written to, which only the block loop does."""
    before = _versions(block)
    yield
    if changed := sorted(name for name, version in _versions(block).items() if version != before[name]):
        raise RunError(
            f"{block.name}: the method changed {', '.join(changed)} in place; the weights of a task are the model's "
            "own: change a copy, and give it in PrunedBlock(weights=...) (docs/extending.md)"
        )


def check_decided(block: Block, pruned: object, goal: Goal) -> None:
    """RunError: the method gave something else than a boolean keep mask, an allocation in [0, 1] and, where it changes
    weights, a weight of each linear, in their shapes; masks that break the goal's pattern; norms that the block has
    not; or a loss or step that is no finite number."""
    if not isinstance(pruned, PrunedBlock):
        raise RunError(f"{block.name}: the method gave {type(pruned).__name__}, not a PrunedBlock (docs/extending.md)")
    parts = {"keep_masks": pruned.keep_masks, "allocated": pruned.allocated, "weights": pruned.weights}
    for part, found in parts.items():
        if found is None:
            continue
        if odd := sorted(found.keys() ^ block.linears.keys()):
            raise RunError(f"{block.name}: the method's {part} are not those of the block's linears: {', '.join(odd)}")
        for name, linear in block.linears.items():
            shape = linear.weight.shape[: 1 if part == "allocated" else 2]
            check_tensor(f"{block.name}.{name}: the method's {part}", found[name], shape, part == "keep_masks")
    for name in block.linears:
        where = f"{block.name}.{name}: the method's"
        least, most = map(float, pruned.allocated[name].aminmax())
        if not (least >= -ROUNDING and most <= 1 + ROUNDING):
            raise RunError(
                f"{where} allocated are from {least:g} to {most:g}; it is the sparsity asked of each row, in [0, 1]"
            )
        mask, order = pruned.keep_masks[name], pruned.permutations.get(name)
        _check_pattern(where, mask, pruned.allocated[name], order, goal)
    _check_norms(block, pruned.norms)
    _check_course(block, pruned)


def _check_pattern(where: str, keep_mask: Tensor, allocated: Tensor, order: Tensor | None, goal: Goal) -> None:
    """No group of inputs keeps more than its N: the pattern's, or where rows choose theirs what is allocated to the
    row. Fewer may be left where kept weights round to zero; of a linear that stays whole nothing is claimed, as under
    `pruner=dense`."""
    columns = keep_mask.shape[1]
    if order is not None:
        numbers = torch.arange(columns, device=order.device)
        if order.shape != numbers.shape or not torch.equal(order.sort().values, numbers):
            raise RunError(f"{where} permutations must hold each of the {columns} inputs once")
        keep_mask = keep_mask[:, order.to(keep_mask.device)]
    kept, group = goal.pattern or (None, goal.group)
    if group is None or keep_mask.all():
        return
    most = keep_mask.reshape(len(keep_mask), -1, group).sum(dim=-1).amax(dim=1)
    allowed = ((1 - allocated.double()) * group).round().to(most.device) if kept is None else most.new_tensor(kept)
    if not (over := most > allowed).any():
        return
    row = int(over.nonzero()[0])
    pattern = (
        f"{int(allowed[row])} of {group} are allocated to it" if kept is None else f"the pattern is {kept}:{group}"
    )
    raise RunError(
        f"{where} keep_masks keep {int(most[row])} of {group} consecutive inputs of row {row} where {pattern}; keep to "
        "it, as keep_n_of_m of besa_exp.tensors.masks does, or refuse the pattern in check"
    )


def _check_norms(block: Block, norms: Mapping[str, Tensor]) -> None:
    """Parameters that no mask is of."""
    others = {name: one for name, one in block.module.named_parameters() if one.dim() == 1}
    for path, found in norms.items():
        if path not in others:
            raise RunError(
                f"{block.name}: the method's norms hold {path}, which is no norm or bias of the block; it has "
                f"{', '.join(others) or 'none'}"
            )
        check_tensor(f"{block.name}.{path}: the method's norms", found, others[path].shape)


def _check_course(block: Block, pruned: PrunedBlock) -> None:
    before = pruned.loss_before
    if before is not None and not (isinstance(before, int | float) and math.isfinite(before)):
        raise RunError(
            f"{block.name}: the method's loss_before is {before!r}; it is a finite float, as probe_loss gives it"
        )
    for number, step in enumerate(pruned.steps):
        if not isinstance(step, Step):
            raise RunError(
                f"{block.name}: the method's steps hold {type(step).__name__}; give a tuple of "
                "besa_exp.blocks.reports.Step"
            )
        if not all(map(math.isfinite, (step.loss, step.reconstruction, step.penalty, step.expected_sparsity))):
            raise RunError(f"{block.name}: step {number} of the method is not finite: {step}")


def _versions(block: Block) -> dict[str, int]:
    """How often each parameter was written to."""
    return {name: parameter._version for name, parameter in block.module.named_parameters()}
