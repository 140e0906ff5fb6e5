"""Reconstruction as an update: the kept weights of any mask, tuned under the block's loss (besa_exp.methods.tuning)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.pruner import PrunedBlock
from besa_exp.blocks.reports import Step
from besa_exp.methods.tuning import Tuning, tune
from besa_exp.tensors.masks import Target


@dataclass(frozen=True)
class Reconstruct:
    """Begins with the pruner's weights, or the dense ones where it updates none."""

    tuning: Tuning = field(default_factory=Tuning)

    statistic = None
    dense_targets = True  # so that a block also makes up for the error of those before it

    def update_block(
        self,
        block: Block,
        inputs: Hidden,
        targets: Hidden,
        statistics: Mapping[str, Any],
        pruned: PrunedBlock,
        target: Target,
        on_step: Callable[[Step], None],
    ) -> PrunedBlock:
        """Tune under the pruner's keep masks."""
        dense = {name: linear.weight for name, linear in block.linears.items()}
        begun = dense if pruned.weights is None else pruned.weights
        tuned = tune(block, inputs, targets, begun, pruned.keep_masks, self.tuning, on_step)
        found = replace(pruned, weights=tuned.weights, norms=tuned.norms)
        return replace(found, loss_before=tuned.loss_before, steps=tuned.steps)
