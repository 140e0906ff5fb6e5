"""The parts of a block, attention and MLP, pruned one after the other (scope=sub_block).

Each part has the budget of its own weights, and targets of its own: what it would make, dense, of what the parts before
it have become. Whatever is learned in a block can be learned in its parts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from besa_exp.blocks.block import Block
from besa_exp.blocks.linears import Linear
from besa_exp.blocks.probe import probe_loss
from besa_exp.blocks.pruner import PrunedBlock, Task
from besa_exp.blocks.units import sub_blocks


@runtime_checkable
class Learner(Protocol):
    """A pruner that learns from `batch_size` samples a step, from a known start."""

    @property
    def batch_size(self) -> int: ...

    def start(self, task: Task) -> dict[str, Tensor]:
        """The weights of the block where the search begins."""
        ...

    def prune_block(self, task: Task) -> PrunedBlock: ...


def prune_parts(task: Task, learner: Learner) -> PrunedBlock:
    """What the learner makes of each part, as one. Its `loss_before` is that of the block with all parts at their
    start, its steps are numbered through."""
    parts = _parts(task)
    start = {name: weight for part in parts for name, weight in learner.start(part).items()}
    loss_before = probe_loss(task.block, task.inputs, task.targets, start)
    own_targets = torch.empty_like(task.targets)
    fixed: dict[str, tuple[Linear, Tensor]] = {}
    found: list[PrunedBlock] = []
    for part in parts:
        block = replace(part.block, fixed=dict(fixed))
        targets = block.outputs(task.inputs, learner.batch_size, out=own_targets)
        done = sum(len(pruned.steps) for pruned in found)
        pruned = learner.prune_block(replace(part, block=block, targets=targets).after(done)).after(done)
        found.append(pruned)
        fixed |= {name: (block.linears[name], weight) for name, weight in _pruned_weights(block, pruned).items()}
    return _joined(found, loss_before)


def _parts(task: Task) -> list[Task]:
    """A task for each part and the linears that are its own, with budgets that add up exactly."""
    tasks, done = [], 0
    for part, names in sub_blocks(task.block, task.inputs):
        block = replace(part, linears={name: part.linears[name] for name in names})
        size = sum(linear.weight.numel() for linear in block.linears.values())
        total = round(task.goal.sparsity * (done + size)) - round(task.goal.sparsity * done)
        statistics = {name: task.statistics[name] for name in names if name in task.statistics}
        gradients = {name: task.gradients[name] for name in names if name in task.gradients}
        goal = replace(task.goal, sparsity=total / size)
        tasks.append(replace(task, block=block, statistics=statistics, gradients=gradients, goal=goal))
        done += size
    return tasks


def _pruned_weights(block: Block, pruned: PrunedBlock) -> dict[str, Tensor]:
    weights = pruned.weights or {name: linear.weight.detach() for name, linear in block.linears.items()}
    return {name: weight * pruned.keep_masks[name] for name, weight in weights.items()}


def _joined(parts: list[PrunedBlock], loss_before: float) -> PrunedBlock:
    weights = {name: weight for part in parts for name, weight in (part.weights or {}).items()}
    return PrunedBlock(
        keep_masks={name: mask for part in parts for name, mask in part.keep_masks.items()},
        allocated={name: rows for part in parts for name, rows in part.allocated.items()},
        weights=weights or None,
        loss_before=loss_before,
        steps=tuple(step for part in parts for step in part.steps),
    )
