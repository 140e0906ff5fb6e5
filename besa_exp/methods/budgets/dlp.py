"""DLP (Chen et al., arXiv 2505.23807): blocks of a low median importance give up more.

    u_l = 1 / median of the block's Wanda scores,    s_l = s + alpha' (u_l - mean u),

alpha' such that the sparsities span 2 alpha; alpha = 0.15 at 70 % is the authors' choice. Their code takes the mean of
the scores where the paper says median; here it is the median. A block of median 0, half of whose weights are zero
already, gives up `width` more than all others, which is the limit of the formula.
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
from besa_exp.rules import check_fields, within
from besa_exp.tensors.importance import Importance, ImportanceName, importance_of
from besa_exp.tensors.selection import kth_smallest

NEAR_ZERO = 1e-12  # of the largest median: smaller ones count as that


@dataclass(frozen=True)
class Dlp:
    """`width` is twice the paper's alpha: between the least and the most that a block gives up."""

    width: Annotated[float, within(least=0, below=1)] = 0.3
    importance: Importance | ImportanceName = "wanda"

    def __post_init__(self) -> None:
        check_fields(self, "budget")

    def sparsities(
        self, blocks: Iterable[Block], inputs: Hidden, sparsity: float, batch_size: int
    ) -> Float[Tensor, " block"]:
        """One pass of the dense model."""
        medians = torch.tensor(
            survey(blocks, inputs, importance_of(self.importance), batch_size, median_score), dtype=torch.float64
        )
        least = max(float(medians.max()) * NEAR_ZERO, torch.finfo(medians.dtype).tiny)
        return around(1 / medians.clamp(min=least), sparsity, self.width)


def median_score(block: Block, observed: Observed) -> float:
    """The median (of two middle ones the lower) of the scores of all linears of the block."""
    scores = torch.cat([observed.score(block, name).flatten() for name in block.linears])
    on_cpu = scores.device.type == "cpu"  # elsewhere it sorts them, with 8 bytes of index for each
    return float(scores.median() if on_cpu else kth_smallest(scores.float(), (len(scores) + 1) // 2))
