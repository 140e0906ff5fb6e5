"""The gradient of the loss with respect to the probabilities of candidate sparsities (BESA, Eq. 3 and 4)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def candidate_gradient(
    weight: Float[Tensor, "out in"],
    gradient: Float[Tensor, "out in"],
    rank: Int[Tensor, "out in"],
    cuts: Int[Tensor, " candidate"],
) -> Float[Tensor, "out candidate"]:
    """dL / d beta_d of each row, straight through the hard mask: minus the sum of W dL/dW over ranks below cut_d.

    The soft mask prunes the weight at rank r with probability P(r) = sum of beta_d over cut_d > r, so that
    d(W (1 - P)) / d beta_d = -W at ranks below cut_d: a prefix sum over buckets of ranks. `gradient` is dL/dW of the
    masked weight, `cuts` = floor(in * p_d) in any order; the result is fp32 whatever the weights are."""
    edges, candidate_of_edge = torch.unique(cuts, return_inverse=True)
    bucket_of_rank = torch.bucketize(torch.arange(weight.shape[1], device=cuts.device), edges, right=True)
    product = weight.float() * gradient.float()
    sums = product.new_zeros(len(weight), len(edges) + 1)
    sums.scatter_add_(1, bucket_of_rank[rank.long()], product)
    return -sums.cumsum(dim=1)[:, :-1][:, candidate_of_edge]
