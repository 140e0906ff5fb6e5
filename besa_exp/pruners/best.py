"""The best that this project knows: masks and kept weights learned under the model's own loss.

1. Block by block: BESA's learned row sparsities (`besa`), or SparseGPT's mask and weights under N:M.
2. The sparsities of all rows of all blocks together, by the divergence from the dense model (`model_search`); N:M
   leaves nothing to allocate.
3. The kept weights of all blocks together, by the same loss, under the fixed mask (`model_tuning`).

What each step gains is told in `experiments/real_model`. Steps 2 and 3 hold the model's inputs and outputs, and step 3
three fp32 numbers a weight; where that is too much, `besa_reconstruct` does with one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from besa_exp.blocks import Block, Hidden
from besa_exp.masks import Target
from besa_exp.pruners.besa import Besa
from besa_exp.pruners.model_search import ModelSearch
from besa_exp.pruners.model_tuning import ModelTuning
from besa_exp.pruners.sparsegpt import SparseGPT
from besa_exp.pruning import PrunedBlock
from besa_exp.reports import Step
from besa_exp.scope import Refinement
from besa_exp.statistics import Hessian


@dataclass(frozen=True)
class Best:
    """`besa` and `sparsegpt`: the start, without and with N:M; `model` and `tuning`: what follows."""

    besa: Besa = field(default_factory=Besa)
    sparsegpt: SparseGPT = field(default_factory=SparseGPT)
    model: ModelSearch = field(default_factory=ModelSearch)
    tuning: ModelTuning = field(default_factory=ModelTuning)

    statistic = Hessian
    dense_targets = False

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """What the start can do."""
        return (
            self.besa.check(sparsity, pattern) if pattern == "unstructured" else self.sparsegpt.check(sparsity, pattern)
        )

    def refinements(self, pattern: str) -> tuple[Refinement, ...]:
        """What follows the block loop."""
        return (self.model, self.tuning) if pattern == "unstructured" else (self.tuning,)

    def prune_block(
        self,
        block: Block,
        inputs: Hidden,
        targets: Hidden,
        statistics: Mapping[str, Hessian],
        target: Target,
        on_step: Callable[[Step], None],
    ) -> PrunedBlock:
        """The start."""
        start = self.sparsegpt if target.pattern else self.besa
        return start.prune_block(block, inputs, targets, statistics, target, on_step)
