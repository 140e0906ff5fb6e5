"""The parts of a block, attention and MLP, pruned one after the other (scope=sub_block).

Each part has the budget of its own weights, and targets of its own: what it would make, dense, of what the parts before
it have become. Whatever is learned in a block can be learned in its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from besa_exp.blocks.linears import Linear
from besa_exp.blocks.probe import probe_loss
from besa_exp.blocks.pruner import PrunedBlock, Task
from besa_exp.blocks.units import sub_blocks


def prune_parts(
    task: Task, start: Callable[[Task], dict[str, Tensor]], prune: Callable[[Task], PrunedBlock], batch_size: int
) -> PrunedBlock:
    """What `prune` makes of each part, as one. Its `loss_before` is that of the block with all parts at the weights of
    their `start`, its steps are numbered through."""
    parts = _parts(task)
    begun = {name: weight for part in parts for name, weight in start(part).items()}
    loss_before = probe_loss(task.block, task.inputs, task.targets, begun)
    own_targets = torch.empty_like(task.targets)
    fixed: dict[str, tuple[Linear, Tensor]] = {}
    found: list[PrunedBlock] = []
    for part in parts:
        block = replace(part.block, fixed=dict(fixed))
        targets = block.outputs(task.inputs, batch_size, out=own_targets)
        done = sum(len(pruned.steps) for pruned in found)
        pruned = prune(replace(part, block=block, targets=targets).after(done)).after(done)
        found.append(pruned)
        weights = pruned.weights or part.weights
        fixed |= {name: (block.linears[name], weights[name] * mask) for name, mask in pruned.keep_masks.items()}
    moved = {name: weight for pruned in found for name, weight in (pruned.weights or {}).items()}
    return PrunedBlock(
        keep_masks={name: mask for pruned in found for name, mask in pruned.keep_masks.items()},
        allocated={name: rows for pruned in found for name, rows in pruned.allocated.items()},
        weights=moved or None,
        loss_before=loss_before,
        steps=tuple(step for pruned in found for step in pruned.steps),
    )


def _parts(task: Task) -> list[Task]:
    """A task for each part and the linears that are its own, with budgets that add up exactly."""
    tasks, done = [], 0
    for part, names in sub_blocks(task.block, task.inputs):
        block = replace(part, linears={name: part.linears[name] for name in names})
        size = block.num_weights
        total = round(task.goal.sparsity * (done + size)) - round(task.goal.sparsity * done)
        statistics = {name: task.statistics[name] for name in names if name in task.statistics}
        gradients = {name: task.gradients[name] for name in names if name in task.gradients}
        goal = replace(task.goal, sparsity=total / size)
        tasks.append(replace(task, block=block, statistics=statistics, gradients=gradients, goal=goal))
        done += size
    return tasks
