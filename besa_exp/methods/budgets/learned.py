"""Our own budget: what each block's sparsity costs at the model's output is measured, then the total is dealt out.

BESA (arXiv 2402.16880) allocates within a block by the error at the block's output. Across blocks the error that counts
is the one at the last block's output: an early block's error is carried through all later ones. So one pass over the
dense model carries, for a few calibration samples, beside the dense states those of models in which a single block is
pruned to one of a few levels (the same in every row, by `importance`). With e_l(s) the relative squared error of the
last block's output when block l alone is pruned to s,

    minimise  sum_l e_l(s_l)   subject to   sum_l n_l s_l = s sum_l n_l,

n_l the weights of block l. Between levels ln e is linear in s. Where every e_l is convex, dealing out in small equal
shares, each to the block whose error per weight rises least, is optimal; errors of different blocks are taken to add.

Cost: blocks x levels / 2 passes of `num_samples` samples through the model: with 4 of 128 samples and 3 levels, for 32
blocks, 1.5 passes of the calibration set, where a BESA run makes five. Blocks are read once, so streaming works; the
blocks x levels states lie in memory, on the device where the activations are there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.observation import Observed
from besa_exp.machine import distributed
from besa_exp.methods.budgets.budget import Work, pruned_to
from besa_exp.rules import Count, Fraction, check_fields
from besa_exp.tensors.importance import Importance, ImportanceName, importance_of

SHARES = 400  # steps in which a block's sparsity is dealt out


@dataclass(frozen=True)
class Learned:
    """`width`: how far a level, and a block's sparsity, may be from the target. `num_samples` are measured with."""

    width: Fraction = 0.2
    num_samples: Count = 4
    importance: Importance | ImportanceName = "wanda"

    def __post_init__(self) -> None:
        check_fields(self, "budget")

    def levels(self, sparsity: float) -> list[float]:
        """The sparsities that are tried, within (0, 1) and `width` of the target."""
        low, high = max(sparsity - self.width, 0.1 * sparsity), min(sparsity + self.width, 0.5 * (1 + sparsity))
        return [low, sparsity, high]

    def sparsities(
        self, blocks: Iterable[Block], inputs: Hidden, sparsity: float, batch_size: int
    ) -> Float[Tensor, " block"]:
        """One pass, dense and perturbed states side by side."""
        levels = self.levels(sparsity)
        errors, sizes = self._errors(blocks, inputs, levels, batch_size)
        return deal_out(torch.tensor(levels, dtype=torch.float64), errors, sizes, sparsity)

    def work(self, num_blocks: int, num_samples: int, seq_len: int, sparsity: float) -> Work:
        """The dense states, and beside them each block's at every level, through all later blocks."""
        levels, samples = len(self.levels(sparsity)), min(self.num_samples, num_samples)
        return Work(num_blocks, samples * (num_blocks + levels * num_blocks * (num_blocks + 1) // 2))

    def _errors(
        self, blocks: Iterable[Block], inputs: Hidden, levels: list[float], batch_size: int
    ) -> tuple[Float[Tensor, "block level"], Float[Tensor, " block"]]:
        """e_l(s) at the levels, and the blocks' weights."""
        importance = importance_of(self.importance)
        own = max(1, distributed.own_place(self.num_samples))  # each rank has one at least
        dense, perturbed, sizes = inputs[:own].clone(), [], []
        for block in blocks:
            for states in perturbed:
                block.outputs(states, batch_size, out=states)
            before = dense
            observed, dense = Observed.of(importance, block, before, batch_size)
            perturbed += [block.outputs(before, batch_size, weights) for weights in pruned_to(block, observed, levels)]
            sizes.append(block.num_weights)
        scale = distributed.all_sum(dense.double().square().sum())
        squared = [distributed.all_sum((states.double() - dense.double()).square().sum()) for states in perturbed]
        errors = torch.stack(squared).view(len(sizes), len(levels)) / scale
        return errors.cpu(), torch.tensor(sizes, dtype=torch.float64)


def deal_out(
    levels: Float[Tensor, " level"],
    errors: Float[Tensor, "block level"],
    sizes: Float[Tensor, " block"],
    sparsity: float,
) -> Float[Tensor, " block"]:
    """Sparsities between the first and the last level with the least sum of errors at the total: share by share, each
    to the block whose error rises least for a weight. ln(error) is linear between levels and never falls."""
    grid = torch.linspace(float(levels[0]), float(levels[-1]), SHARES + 1, dtype=torch.float64)
    logarithms = errors.double().clamp(min=1e-30).log().cummax(dim=1).values
    right = torch.searchsorted(levels, grid).clamp(1, len(levels) - 1)
    share = (grid - levels[right - 1]) / (levels[right] - levels[right - 1])
    course = (logarithms[:, right - 1] + share * (logarithms[:, right] - logarithms[:, right - 1])).exp()
    rises = course.diff(dim=1) / sizes[:, None]
    rises = rises.cummax(dim=1).values  # the shares of a block come in order, also where its error is not convex
    left = sparsity * sizes.sum() - float(grid[0]) * sizes.sum()
    cheapest = torch.argsort(rises.flatten(), stable=True)
    costs = sizes[cheapest // SHARES] * (grid[1] - grid[0])
    taken = (left - (costs.cumsum(dim=0) - costs)).clamp(min=0).minimum(costs) / costs
    shares = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, cheapest // SHARES, taken)
    return grid[0] + shares * (grid[1] - grid[0])
