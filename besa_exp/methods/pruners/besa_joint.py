"""BESA on quantised weights: sparsities and clipping learned together (Xu et al., arXiv 2402.16880, Section 3.3).

    W_hat = Q(W; clipping) where rank >= k, else 0

Kept weights are rounded in every pass, and the clipping of each row or group is learned by the same loss and steps as
the sparsities (`besa`). Ranks are by what a rounded weight spares (`rounded_importance`). Weights that round to zero go
first; where a row keeps some all the same, they are zeros beyond the budget, and reported as such.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from besa_exp.blocks.pruner import PrunedBlock, Task, Traits
from besa_exp.methods.allocation import Rows
from besa_exp.methods.cuts import Buffers
from besa_exp.methods.pruners.besa import Besa, total_of, uniform
from besa_exp.methods.pruners.sub_blocks import prune_parts
from besa_exp.tensors.importance import Wanda, importance_of, rounded_importance
from besa_exp.tensors.quantisation import Quantiser, quantise, rounded

# Strength of all clipping at first: 1, where the sigmoid never gets, would clip nothing. OmniQuant: sigmoid(4) = 0.982.
CLIPPING_START = 0.99
CLIPPING_LR = 0.1  # first step size of the strengths' logits


@dataclass(frozen=True)
class BesaJoint:
    """`pruner` learns the sparsities; `quantiser` is what the kept weights are rounded with."""

    pruner: Besa = field(default_factory=Besa)
    quantiser: Quantiser = field(default_factory=Quantiser)

    def __post_init__(self) -> None:
        if self.pruner.scope == "model":
            raise ValueError("pruner.pruner.scope=model: its search rounds no weights; use block, pair or sub_block")
        if importance_of(self.pruner.importance) != Wanda():
            raise ValueError(
                f"pruner.pruner.importance={self.pruner.importance}: rounded weights are ranked by what they spare of "
                "Wanda's error; leave it at wanda"
            )

    @property
    def traits(self) -> Traits:
        return replace(self.pruner.traits, quantiser=self.quantiser)

    @property
    def batch_size(self) -> int:
        return self.pruner.batch_size

    def check(self, sparsity: float, pattern: str) -> list[str]:
        return self.pruner.check(sparsity, pattern)

    def prune_block(self, task: Task) -> PrunedBlock:
        """Learn sparsities and clipping, then fix masks and rounded weights. Kept weights that round to zero count as
        pruned."""
        if self.pruner.scope == "sub_block":
            prune = replace(self, pruner=replace(self.pruner, scope="block")).prune_block
            return prune_parts(task, self.start, prune, self.batch_size)
        dense = self._rows(task)
        logits = {name: self._logits(weight).requires_grad_() for name, weight in dense.weights.items()}

        def effective() -> Rows:
            weights = {name: rounded(weight, self.quantiser, logits[name]) for name, weight in dense.weights.items()}
            return replace(dense, weights=weights)

        clipping = [(own, CLIPPING_LR) for own in logits.values()]
        sparsity, loss_before, steps = self.pruner.learn(task, dense, effective, clipping)
        with torch.no_grad():
            rows = effective()
        counts = rows.counts(sparsity, total_of(task, rows))
        keep_masks = {name: mask & (rows.weights[name] != 0) for name, mask in rows.keep_masks(counts).items()}
        return PrunedBlock(keep_masks, rows.sparsity(counts), rows.weights, loss_before, steps)

    def start(self, task: Task) -> dict[str, Tensor]:
        """The rounded weights where the search begins: the same sparsity in every row, hardly clipped."""
        rows = self._rows(task)
        start = {name: quantise(W, self.quantiser, self._logits(W)) for name, W in rows.weights.items()}
        rows = replace(rows, weights=start)
        return Buffers.like(rows.weights).fill(rows, rows.counts(*uniform(task, rows)))

    def _rows(self, task: Task) -> Rows:
        """The dense rows, ranked by what they spare when rounded."""
        weights = task.weights

        def score(name: str) -> Tensor:
            full_range = quantise(weights[name], self.quantiser)
            return rounded_importance(weights[name], full_range, task.statistics[name].squared_norm)

        return self.pruner.rows(task, score)

    def _logits(self, weight: Tensor) -> Tensor:
        return self.quantiser.logits(weight, CLIPPING_START)
