"""DLP (Chen et al., arXiv 2505.23807): blocks whose median score is large give up more.

    u_l = median of the block's Wanda scores,    i_l = 1 - u_l / sum u,    s_l = s - alpha' (i_l - mean i),

with the unimportance u_l, the relative importance i_l, and alpha' such that the sparsities span 2 alpha; 0.15 is the
authors' alpha at 70 %. So s_l grows in a straight line with u_l, and blocks of small scores, the first ones of most
models, are spared. The authors' code takes the mean of the scores where the paper says median; here it is the median.
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
        medians = survey(blocks, inputs, importance_of(self.importance), batch_size, median_score)
        return around(torch.tensor(medians, dtype=torch.float64), sparsity, self.width)


def median_score(block: Block, observed: Observed) -> float:
    """The median (of two middle ones the lower) of the scores of all linears of the block."""
    scores = torch.cat([observed.score(block, name).flatten() for name in block.linears])
    on_cpu = scores.device.type == "cpu"  # elsewhere it sorts them, with 8 bytes of index for each
    return float(scores.median() if on_cpu else kth_smallest(scores.float(), (len(scores) + 1) // 2))
