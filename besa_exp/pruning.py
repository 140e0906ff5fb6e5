"""The block loop. One loop for all methods: observe, prune, write, go on with the pruned block's outputs.

Every block is pruned on the outputs of the pruned blocks before it (the pruned prefix), as in Wanda, SparseGPT, BESA.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from besa_exp import distributed
from besa_exp.activations import Allocate
from besa_exp.blocks import Block, Hidden
from besa_exp.errors import RunError
from besa_exp.losses import Loss, token_loss
from besa_exp.masks import Target
from besa_exp.observation import observe
from besa_exp.reports import BlockReport, LinearReport, Step
from besa_exp.statistics import Statistic, is_finite

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrunedBlock:
    """What a pruner decided: the keep mask of every linear [out in], new weights where the kept ones moved, the
    sparsity allocated to every row [out], and a search's course; `loss_before` is the probe samples' loss where the
    search or update began (None: nothing was searched or updated). `norms`: new values of norms' parameters, by path.
    `permutations`: the order of a linear's inputs in which its mask is N:M, where that is not their own.

    `_out` and `_in` are of each linear its own, in whatever order the linears come."""

    keep_masks: Mapping[str, Bool[Tensor, "_out _in"]]
    allocated: Mapping[str, Float[Tensor, " _out"]]
    weights: Mapping[str, Float[Tensor, "_out _in"]] | None = None
    loss_before: float | None = None
    steps: tuple[Step, ...] = ()
    norms: Mapping[str, Float[Tensor, " _size"]] = field(default_factory=dict)
    permutations: Mapping[str, Int[Tensor, " _in"]] = field(default_factory=dict)


def pruned_by_masks(keep_masks: Mapping[str, Bool[Tensor, "out in"]]) -> PrunedBlock:
    """The result of a method that decides masks alone, in one go."""
    return PrunedBlock(keep_masks, {name: 1 - mask.float().mean(dim=1) for name, mask in keep_masks.items()})


def joined(parts: Sequence[PrunedBlock]) -> PrunedBlock:
    """The parts of a block as one, with the first one's `loss_before`."""
    weights = {name: weight for part in parts for name, weight in (part.weights or {}).items()}
    return PrunedBlock(
        keep_masks={name: mask for part in parts for name, mask in part.keep_masks.items()},
        allocated={name: rows for part in parts for name, rows in part.allocated.items()},
        weights=weights or None,
        loss_before=parts[0].loss_before,
        steps=tuple(step for part in parts for step in part.steps),
    )


@runtime_checkable
class Pruner(Protocol):
    """A method knows one block, its inputs, the targets and the statistics; never a model, a data set or a config."""

    @property
    def statistic(self) -> type[Statistic] | None:
        """What to observe about the inputs of each linear; None: nothing."""
        ...

    @property
    def dense_targets(self) -> bool:
        """Whether targets come from dense inputs (else: the dense block on the pruned prefix's outputs)."""
        ...

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Problems with this target, in complete sentences."""
        ...

    def prune_block(
        self,
        block: Block,
        inputs: Hidden,
        targets: Hidden,
        statistics: Mapping[str, Any],
        target: Target,
        on_step: Callable[[Step], None],
    ) -> PrunedBlock:
        """Decide the block's masks (and weights). Must not change the block."""
        ...


def finite_step(
    block: Block, step: int, loss: Tensor, reconstruction: Tensor, penalty: Tensor | float, sparsity: Tensor | float
) -> Step:
    """The record of one optimisation step. RunError: the loss is not finite."""
    loss, reconstruction = loss.detach(), reconstruction.detach()
    if not torch.isfinite(loss):
        raise RunError(
            f"{block.name}: the loss is {float(loss)} at step {step}; its inputs or targets are not finite, or the "
            "model's dtype overflows: load it in float32 or bfloat16 (model.dtype)."
        )
    values = (float(torch.as_tensor(value).detach()) for value in (loss, reconstruction, penalty, sparsity))
    return Step(block.index, step, *values)


def checked_gradient(step: Step, gradient: Tensor) -> Tensor:
    """`gradient` itself. RunError: it is not finite. Where it is all zero although there is a loss, a warning says so:
    the search learns nothing in such a step."""
    largest = float(gradient.abs().max())
    if not math.isfinite(largest):
        raise RunError(
            f"block {step.block}: the gradient is {largest} at step {step.step}; the dtype overflows: compute in "
            "float32 or bfloat16 (compute_dtype or model.dtype)."
        )
    if largest == 0 and step.reconstruction > 0:
        logger.warning(
            "block %d: the gradient of step %d is zero everywhere although the loss is %.3g, so nothing is learned "
            "from it; compute in float32 or bfloat16 (compute_dtype or model.dtype)",
            step.block,
            step.step,
            step.reconstruction,
        )
    return gradient


def num_probe_samples(num_samples: int) -> int:
    """How many samples, the last ones, a search does not learn from: they choose between its states and give the
    reported losses."""
    return max(1, min(16, num_samples // 8))


def own_probe(samples: Hidden) -> Float[Tensor, "probe seq hidden"]:
    """This rank's part of the probe samples, given all that it owns."""
    num_samples = distributed.total(len(samples))
    return samples[distributed.own_place(num_samples - num_probe_samples(num_samples)) :]


def probe_loss(
    block: Block, inputs: Hidden, targets: Hidden, weights: Mapping[str, Tensor], loss: Loss = token_loss
) -> float:
    """The loss of the probe samples with `weights` in place of the block's own. RunError: not finite."""
    probe = own_probe(inputs)
    return _finite_loss(block, block.outputs(probe, max(1, len(probe)), weights), own_probe(targets), loss)


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
    target: Target | Sequence[Target],
    batch_size: int,
    on_step: Callable[[Step], None] = lambda step: None,
    restore: Callable[[Block], bool] = lambda block: False,
    allocate: Allocate | None = None,
) -> Iterator[tuple[BlockReport, PrunedBlock]]:
    """Prune the blocks in place, one after the other, `batch_size` samples a forward pass. `inputs`, those of the
    samples that this rank owns, are overwritten.

    `target` is that of every block, or a list by block index. `restore` puts the pruned weights of an earlier run into
    a block and says so: it is not pruned again, nor yielded. `allocate` gives room for activations, by default where
    the inputs lie. RunError: a statistic, loss or weight is not finite; the block and the linear are named."""

    def room() -> Hidden:
        return allocate(inputs.shape, inputs.dtype) if allocate else torch.empty_like(inputs)

    targets = room()
    dense_inputs = room().copy_(inputs) if pruner.dense_targets else inputs
    observed = room() if pruner.dense_targets else targets  # the block as it is, on the pruned prefix
    for block in blocks:
        started = time.perf_counter()
        if pruner.dense_targets:
            block.outputs(dense_inputs, batch_size, out=targets)
        pruned = None
        if not restore(block):
            statistics, _ = observe(block, inputs, pruner.statistic, batch_size, observed)
            wanted = target if isinstance(target, Target) else target[block.index]
            pruned = pruner.prune_block(block, inputs, targets, statistics, wanted, on_step)
            del statistics
            write_weights(block, pruned)
        block.outputs(inputs, batch_size, out=inputs)
        if pruned:
            after = _finite_loss(block, own_probe(inputs), own_probe(targets))
            yield _report(block, pruned, after, time.perf_counter() - started), pruned
            del pruned  # before the next block is read
        if pruner.dense_targets:
            dense_inputs, targets = targets, dense_inputs


def _finite_loss(block: Block, outputs: Hidden, targets: Hidden, loss: Loss = token_loss) -> float:
    value = float(loss(outputs, targets))
    if not math.isfinite(value):
        raise RunError(
            f"{block.name}: the reconstruction loss is {value}; its inputs, targets or outputs are not finite."
        )
    return value


def _report(block: Block, pruned: PrunedBlock, after: float, seconds: float) -> BlockReport:
    before = after if pruned.loss_before is None else pruned.loss_before
    linears = tuple(
        LinearReport(
            name,
            linear.weight.numel(),
            linear.weight.numel() - int(linear.weight.bool().count_nonzero()),  # of floats 15 x slower
            float(pruned.allocated[name].float().mean()),
        )
        for name, linear in block.linears.items()
    )
    return BlockReport(block.index, linears, before, after, seconds, pruned.steps)
