"""ATP (Huang et al., arXiv 2502.14770): sparsities rise over depth by the same step b from block to block.

    s_i = s - b (L - 1) / 2 + i b,    i = 0 .. L - 1.

A single number is to be chosen. The authors try b = 0.002, 0.004, ... up to min(2 s, 2 (1 - s)) / (L - 1), which keeps
all s_i in [0, 1], and take the b with the best test perplexity, so that the test set has chosen it. Here the
calibration samples choose: the b whose model, pruned the same in every row by `importance`, is nearest to the dense
one's predictions (`besa_exp.methods.budgets.trial`). The grid is one of b (L - 1), what lies between first and last
block, so that it is as fine for a model of few blocks as for the authors' (0.002 is 0.062 over 32 blocks); it begins at
0, the uniform budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.methods.budgets.budget import Work
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.budgets.trial import Trial
from besa_exp.rules import Count, check_fields, within
from besa_exp.tensors.importance import Importance, ImportanceName
from besa_exp.tensors.masks import floor_of


@dataclass(frozen=True)
class Atp:
    """`step` of the grid: of the sparsity between the first block and the last. `num_samples` are tried on."""

    step: Annotated[float, within(least=0.001, below=1)] = 0.06
    num_samples: Count = 8
    importance: Importance | ImportanceName = "wanda"

    def __post_init__(self) -> None:
        check_fields(self, "budget")

    def progressions(self, sparsity: float, num_blocks: int) -> list[Float[Tensor, " block"]]:
        """The progressions that are tried, the uniform one first."""
        place = torch.arange(num_blocks, dtype=torch.float64) / max(1, num_blocks - 1)
        widest = torch.tensor(min(2 * sparsity, 2 * (1 - sparsity)), dtype=torch.float64)
        count = int(floor_of(widest / self.step)) + 1
        return [sparsity + number * self.step * (place - place.mean()) for number in range(count)]

    def search(self, trial: Trial, sparsity: float, progress: Progress) -> Float[Tensor, " block"]:
        """One pass of all progressions side by side, too short to be kept."""
        tried = self.progressions(sparsity, len(trial.sizes))
        samples = torch.arange(min(self.num_samples, trial.num_samples))
        errors = trial.divergences([trial.exact(wanted, sparsity) for wanted in tried], samples)
        return tried[errors.index(min(errors))]

    def work(self, num_blocks: int, num_samples: int, seq_len: int, sparsity: float) -> Work:
        samples = len(self.progressions(sparsity, num_blocks)) * min(self.num_samples, num_samples)
        return Work(num_blocks, num_blocks * samples, samples)
