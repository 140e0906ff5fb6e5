"""Pruning and quantisation one after the other: what joint compression (`besa_joint`) is measured against.

`first` prune: the inner pruner sees the dense weights, and what it keeps is rounded. `first` quantise: it sees the
rounded weights, as BESA's baseline prunes the quantised model with Wanda; weights that it moves (SparseGPT) are rounded
again. Scales are those of the full range, nothing is clipped (round to nearest). The statistics are in both cases those
of the dense block on the prefix, which is pruned and quantised; targets are the dense block's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from besa_exp.blocks.block import Block
from besa_exp.blocks.linears import discover_linears
from besa_exp.blocks.pruner import PrunedBlock, Pruner, Task, Traits
from besa_exp.tensors.quantisation import Quantiser, quantise


@dataclass(frozen=True)
class Quantised:
    """`pruner` and `quantiser` in the order that `first` gives."""

    pruner: Pruner
    first: Literal["prune", "quantise"]
    quantiser: Quantiser = field(default_factory=Quantiser)

    @property
    def traits(self) -> Traits:
        return replace(self.pruner.traits, quantiser=self.quantiser)

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """What the inner pruner finds, and a search over the whole model, which would not see the rounding."""
        problems = self.pruner.check(sparsity, pattern)
        if self.pruner.traits.refinements:
            problems = [
                *problems,
                "pruner.pruner: its search over the whole model cannot follow the rounding; leave it out",
            ]
        return problems

    def prune_block(self, task: Task) -> PrunedBlock:
        """Kept weights that round to zero count as pruned."""
        seen = _rounded_copy(task.block, self.quantiser) if self.first == "quantise" else task.block
        seen_task = replace(task, block=seen)
        pruned, weights = self.pruner.prune_block(seen_task), seen_task.weights
        if pruned.weights is not None or self.first == "prune":
            moved = pruned.weights or weights
            weights = {name: quantise(moved[name] * mask, self.quantiser) for name, mask in pruned.keep_masks.items()}
        keep_masks = {name: mask & (weights[name] != 0) for name, mask in pruned.keep_masks.items()}
        return replace(pruned, keep_masks=keep_masks, weights=weights)


@torch.no_grad()
def _rounded_copy(block: Block, quantiser: Quantiser) -> Block:
    """A block of its own whose linears have rounded weights."""
    module = copy.deepcopy(block.module)
    found = discover_linears(module)
    linears = {name: found[name] for name in block.linears}  # what is ignored stays as it is
    for linear in linears.values():
        linear.weight.copy_(quantise(linear.weight, quantiser))
    return replace(block, module=module, linears=linears)
