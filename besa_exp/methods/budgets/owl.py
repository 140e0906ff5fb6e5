"""OWL (Yin et al., arXiv 2310.05175): blocks with more outliers keep more.

    D_l = the share of a block's Wanda scores |W_ij| ||X_j|| above M times their mean,
    keep_l = 1 - s + lambda' (D_l - mean D),   lambda' such that the keep rates span 2 lambda.

M = 5 and lambda = 0.08 are the paper's. The scores are those of all linears of the dense block taken together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.observation import Observed
from besa_exp.methods.budgets.budget import around, survey
from besa_exp.rules import Positive, check_fields, within
from besa_exp.tensors.importance import Importance, ImportanceName, importance_of


@dataclass(frozen=True)
class Owl:
    """`outlier` is the paper's M, `width` twice its lambda."""

    outlier: Positive = 5.0
    width: Annotated[float, within(least=0, below=1)] = 0.16
    importance: Importance | ImportanceName = "wanda"

    def __post_init__(self) -> None:
        check_fields(self, "budget")

    def sparsities(
        self, blocks: Iterable[Block], inputs: Hidden, sparsity: float, batch_size: int
    ) -> Float[Tensor, " block"]:
        """One pass of the dense model."""
        outliers = survey(blocks, inputs, importance_of(self.importance), batch_size, self.outlier_share)
        return around(-torch.tensor(outliers, dtype=torch.float64), sparsity, self.width)

    def outlier_share(self, block: Block, observed: Observed) -> float:
        """D of one block. Scores are made twice and never held together."""

        def scores() -> Iterable[Tensor]:
            return (observed.score(block, name) for name in block.linears)

        mean = sum(float(score.double().sum()) for score in scores()) / block.num_weights
        return sum(int((score > self.outlier * mean).sum()) for score in scores()) / block.num_weights
