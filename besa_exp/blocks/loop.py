"""The block loop. One loop for all methods: observe, prune, write, go on with the pruned block's outputs.

Every block is pruned on the outputs of the pruned blocks before it (the pruned prefix), as in Wanda, SparseGPT, BESA.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from besa_exp.blocks.activations import Allocate
from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.contract import check_decided, untouched
from besa_exp.blocks.observation import observe, squared_gradients
from besa_exp.blocks.probe import MASSIVE, finite_loss, massive_tokens, own_probe
from besa_exp.blocks.pruner import PrunedBlock, Pruner, Task
from besa_exp.blocks.reports import BlockReport, LinearReport, Step
from besa_exp.errors import RunError
from besa_exp.machine import distributed
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.statistics import is_finite

logger = logging.getLogger(__name__)


@torch.no_grad()
def write_weights(block: Block, pruned: PrunedBlock) -> None:
    """Write the pruned weights into the block: the one place where weights change. All ranks write what rank 0 found.
    RunError: a weight is not finite."""
    for name, linear in block.linears.items():
        weight = linear.weight
        if pruned.weights is not None:
            weight.copy_(pruned.weights[name])
        weight.masked_fill_(~pruned.keep_masks[name], 0)
        weight.copy_(distributed.broadcast(weight.contiguous()))
        if not is_finite(weight):
            raise RunError(f"{block.name}.{name}: the pruned weights are not finite in {weight.dtype}.")
    for path, found in pruned.norms.items():
        norm = distributed.broadcast(found.contiguous())
        if not is_finite(norm):
            raise RunError(f"{block.name}.{path}: the tuned norm is not finite in {norm.dtype}.")
        block.module.get_parameter(path).copy_(norm)


def prune_blocks(
    blocks: Iterable[Block],
    inputs: Hidden,
    pruner: Pruner,
    goals: Goal | Sequence[Goal],
    batch_size: int,
    on_step: Callable[[Step], None] = lambda step: None,
    restore: Callable[[Block], bool] = lambda block: False,
    allocate: Allocate | None = None,
) -> Iterator[tuple[BlockReport, PrunedBlock]]:
    """Prune the blocks in place, one after the other, `batch_size` samples a forward pass. `inputs`, those of the
    samples that this rank owns, are overwritten.

    `goals` is that of every block, or a list by block index. `restore` puts the pruned weights of an earlier run into
    a block and returns True: it is not pruned again, nor yielded. `allocate` gives room for activations, by default
    where the inputs lie. RunError: a statistic, loss or weight is not finite; the block and the linear are named."""

    def room() -> Hidden:
        return allocate(inputs.shape, inputs.dtype) if allocate else torch.empty_like(inputs)

    traits = pruner.traits
    if traits.blind:
        inputs = own_probe(inputs)
    targets = room()
    dense_inputs = room().copy_(inputs) if traits.dense_targets else inputs
    observed = room() if traits.dense_targets else targets  # the block as it is, on the pruned prefix
    warned = False
    for block in blocks:
        started = time.perf_counter()
        if traits.dense_targets:
            block.outputs(dense_inputs, batch_size, out=targets)
        pruned = None
        if not restore(block):
            goal = goals if isinstance(goals, Goal) else goals[block.index]
            pruned = _pruned(block, inputs, targets, observed, pruner, goal, batch_size, on_step)
            check_decided(block, pruned, goal)
            write_weights(block, pruned)
        block.outputs(inputs, batch_size, out=inputs)
        if pruned:
            probe = (inputs, targets) if traits.blind else (own_probe(inputs), own_probe(targets))
            after = finite_loss(block, *probe)
            warned = warned or _warned_of_lost_tokens(block, *probe)
            yield _report(block, pruned, after, time.perf_counter() - started), pruned
            del pruned  # before the next block is read
        if traits.dense_targets:
            dense_inputs, targets = targets, dense_inputs


def _pruned(
    block: Block, inputs: Hidden, targets: Hidden, observed: Hidden, pruner: Pruner, goal: Goal, batch_size: int,
    on_step: Callable[[Step], None],
) -> PrunedBlock:  # fmt: skip
    """What the pruner makes of one block, which is not changed; `observed` receives what it gives as it is."""
    if not block.linears:  # all of it stays dense
        block.outputs(inputs, batch_size, out=observed)
        return PrunedBlock({}, {})
    statistics, _ = observe(block, inputs, pruner.traits.observed(goal), batch_size, observed)
    gradients = squared_gradients(block, inputs) if pruner.traits.gradients else {}
    with untouched(block):
        return pruner.prune_block(Task(block, inputs, targets, statistics, goal, on_step, gradients))


def _warned_of_lost_tokens(block: Block, outputs: Hidden, targets: Hidden) -> bool:
    massive, lost = massive_tokens(outputs, targets)
    if lost:
        logger.warning(
            "%s: %d of %d massive tokens of the probe windows are lost. Their states are more than %d times as large "
            "as the others', and most tokens attend to them: the model may be far worse than the reconstruction losses "
            "say. Lower the sparsity, or keep this block dense with ignore",
            block.name, lost, massive, MASSIVE,
        )  # fmt: skip
    return lost > 0


def _report(block: Block, pruned: PrunedBlock, after: float, seconds: float) -> BlockReport:
    before = after if pruned.loss_before is None else pruned.loss_before
    linears = tuple(
        LinearReport.counted(name, linear.weight, float(pruned.allocated[name].float().mean()))
        for name, linear in block.linears.items()
    )
    return BlockReport(block.index, linears, before, after, seconds, pruned.steps)
