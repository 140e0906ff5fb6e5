"""AlphaPruning (Lu et al., arXiv 2410.10912): blocks whose spectra have heavy tails keep more. No data is needed.

The eigenvalues lambda of W^T W above lambda_min follow a power law; its exponent by Hill's estimator is

    alpha = 1 + n / sum_i ln(lambda_i / lambda_min),    the n eigenvalues from lambda_min on.

lambda_min is the place where the density of the eigenvalues on a logarithmic axis is highest: the lower end of the
fullest of 100 bins. The authors' code only begins there: it tries the eigenvalues up to 1.5 times that place, each as
lambda_min, and takes the one whose power law is nearest by Kolmogorov and Smirnov's distance. Here the place itself is
taken, so that alpha follows from one sum.

A well-trained matrix has a heavy tail: a small alpha. A block's alpha is the mean of its linears', without those that
have no tail; of a block of such alone it is the mean of the other blocks'. Sparsities are s times a factor that is
linear in alpha from 1 - epsilon to 1 + epsilon, scaled to the total.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.errors import RunError
from besa_exp.rules import check_fields, within
from besa_exp.tensors.statistics import is_finite

BINS = 100  # of the histogram that shows the densest place


def hill_exponent(weight: Float[Tensor, "out in"]) -> float:
    """alpha of one linear; NaN where all its eigenvalues are equal, so that they have no tail."""
    narrow = (weight if len(weight) <= weight.shape[1] else weight.T).double()  # in fp64 the product loses nothing
    eigenvalues = torch.linalg.eigvalsh(narrow @ narrow.T)
    logarithms = eigenvalues[eigenvalues > eigenvalues.max() * 1e-12].log().cpu()
    if not len(logarithms):  # of zeros
        return math.nan
    counts = torch.histc(logarithms, bins=BINS)
    low, high = logarithms.min(), logarithms.max()
    densest = low + (high - low) * counts.argmax() / BINS
    above = logarithms[logarithms >= densest] - densest
    return float(1 + len(above) / above.sum()) if above.any() else math.nan


@dataclass(frozen=True)
class Alpha:
    """`epsilon`: largest relative deviation from the target, before scaling. 0.3 is the authors' default; at 70 % their
    scripts take 0.2 or 0.3 with Wanda and SparseGPT, 0.3 to 0.5 with magnitude."""

    epsilon: Annotated[float, within(least=0, below=1)] = 0.3

    def __post_init__(self) -> None:
        check_fields(self, "budget")

    def sparsities(
        self, blocks: Iterable[Block], inputs: Hidden, sparsity: float, batch_size: int
    ) -> Float[Tensor, " block"]:
        """The eigenvalues of each linear; `inputs` are not used. RunError: a weight is not finite."""
        exponents, sizes = [], []
        for block in blocks:
            for name, weight in block.weights.items():
                if not is_finite(weight):
                    raise RunError(f"{block.name}.{name}: its weights are not finite; check the checkpoint")
            found = [alpha for alpha in map(hill_exponent, block.weights.values()) if not math.isnan(alpha)]
            exponents.append(sum(found) / len(found) if found else math.nan)
            sizes.append(block.num_weights)
        alpha, weights = torch.tensor(exponents, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
        alpha = alpha.where(~alpha.isnan(), alpha.nanmean())
        spread = alpha.max() - alpha.min()
        place = (alpha - alpha.min()) / spread if spread > 0 else torch.full_like(alpha, 0.5)
        factor = 1 - self.epsilon + 2 * self.epsilon * place
        return sparsity * factor * weights.sum() / (factor * weights).sum()
