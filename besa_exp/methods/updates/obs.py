"""The OBS update under a given mask: SparseGPT's column loop (arXiv 2301.00774, Algorithm 1) without the choice.

The result does not depend on how columns are grouped. On a mask that was not chosen for it, it can be worse than
zeroing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from besa_exp.blocks.pruner import PrunedBlock, Task, Traits
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.rules import Positive, check_fields
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.statistics import Hessian


@dataclass(frozen=True)
class Obs:
    """`damping` is relative to the mean diagonal of H."""

    damping: Positive = 0.01

    traits = Traits(Hessian)

    def __post_init__(self) -> None:
        check_fields(self, "update")

    def check(self, pattern: str) -> list[str]:
        return []

    def update_block(self, task: Task, pruned: PrunedBlock) -> PrunedBlock:
        """From the dense weights, one factor for each shared input."""
        sparsegpt = SparseGPT(damping=self.damping)
        _, weights = sparsegpt.masks_and_weights(replace(task, goal=Goal(0.0)), pruned.keep_masks)
        return replace(pruned, weights=weights)
