"""Pruning and quantisation one after the other: what joint compression (BESA with a quantiser) is measured against.

`first` prune: the inner pruner sees the dense weights, and what it keeps is rounded. `first` quantise: it sees the
rounded weights, as BESA's baseline prunes the quantised model with Wanda; weights that it moves (SparseGPT) are rounded
again. Scales are those of the full range, nothing is clipped (round to nearest). The statistics are in both cases those
of the dense block on the prefix, which is pruned and quantised; targets are the dense block's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.linears import discover_linears
from besa_exp.blocks.pruner import PrunedBlock, Pruner
from besa_exp.blocks.reports import Step
from besa_exp.tensors.masks import Target
from besa_exp.tensors.quantisation import Quantiser, quantise
from besa_exp.tensors.statistics import Statistic


@dataclass(frozen=True)
class Quantised:
    """`pruner` and `quantiser` in the order that `first` says."""

    pruner: Pruner
    first: Literal["prune", "quantise"]
    quantiser: Quantiser = field(default_factory=Quantiser)

    @property
    def statistic(self) -> type[Statistic] | None:
        """The inner pruner's."""
        return self.pruner.statistic

    @property
    def dense_targets(self) -> bool:
        """The inner pruner's."""
        return self.pruner.dense_targets

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """What the inner pruner says."""
        return self.pruner.check(sparsity, pattern)

    def prune_block(
        self,
        block: Block,
        inputs: Hidden,
        targets: Hidden,
        statistics: Mapping[str, Any],
        target: Target,
        on_step: Callable[[Step], None],
    ) -> PrunedBlock:
        """Kept weights that round to zero count as pruned."""
        seen = _rounded_copy(block, self.quantiser) if self.first == "quantise" else block
        pruned = self.pruner.prune_block(seen, inputs, targets, statistics, target, on_step)
        weights = {name: linear.weight.detach() for name, linear in seen.linears.items()}
        if pruned.weights is not None or self.first == "prune":
            moved = pruned.weights or weights
            weights = {name: quantise(moved[name] * mask, self.quantiser) for name, mask in pruned.keep_masks.items()}
        keep_masks = {name: mask & (weights[name] != 0) for name, mask in pruned.keep_masks.items()}
        return replace(pruned, keep_masks=keep_masks, weights=weights)


@torch.no_grad()
def _rounded_copy(block: Block, quantiser: Quantiser) -> Block:
    """A block of its own with rounded weights."""
    module = copy.deepcopy(block.module)
    linears = discover_linears(module)
    for linear in linears.values():
        linear.weight.copy_(quantise(linear.weight, quantiser))
    return replace(block, module=module, linears=linears)
