"""The authors' allocation: a distribution over D + 1 candidate sparsities for each row, or for a linear as a whole.

beta = softmax(sigmoid(theta)), alpha = sum_d beta_d p_d (BESA, Eq. 4); hard masks forward, the gradient of soft masks
backward.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from besa_exp.tensors import kernels
from besa_exp.tensors.masks import keep_by_rank


def float_candidates(step: float) -> Float[Tensor, " candidate"]:
    """1.0, 1.0 - step, ... 0.0 in fp32 as the authors' range drifts: the one meant as 0.5 prunes 2047 of 4096."""
    candidates = torch.arange(1.0, -step, -step)
    candidates[-1] = 0.0
    return candidates


def reach(step: float, sigmoid: bool) -> tuple[float, float]:
    """The least and the largest alpha. softmax(theta) comes as near to 0 and 1 as one likes; softmax(sigmoid(theta)) at
    most e : 1 between the k largest candidates and the others, for the k where that is most."""
    if not sigmoid:
        return 0.0, 1.0
    candidates = float_candidates(step).double()
    return 1 - _largest(1 - candidates.flip(0)), _largest(candidates)


def _largest(candidates: Float[Tensor, " candidate"]) -> float:
    """Of the means with weight e on the first k and 1 on the others."""
    heavier, counts = math.e - 1, torch.arange(1, len(candidates) + 1)
    return float(((candidates.sum() + heavier * candidates.cumsum(0)) / (len(candidates) + heavier * counts)).max())


class SoftmaxInLanes(torch.autograd.Function):
    """softmax over candidates whose denominator is summed in 16 lanes that are then halved, on every machine.

    All rows start at alpha = 0.5 and the first steps move alpha by a few units of fp32 rounding; floor(alpha * in)
    turns these into masks, so that runs on CPUs of other vector widths part at the second step (4e-3 in the loss,
    seen). So the order of the sum is part of the algorithm here. Sixteen lanes reproduce the recorded runs."""

    @staticmethod
    def forward(ctx, logits: Float[Tensor, "*row candidate"], lanes: int) -> Float[Tensor, "*row candidate"]:
        powers = (logits - logits.amax(dim=-1, keepdim=True)).exp()
        first, *others = nn.functional.pad(powers, (0, -powers.shape[-1] % lanes)).split(lanes, dim=-1)
        partial = sum(others, start=first)
        while partial.shape[-1] > 1:
            low, high = partial.chunk(2, dim=-1)
            partial = low + high
        beta = powers * (1 / partial)
        ctx.save_for_backward(beta)
        return beta

    @staticmethod
    def backward(ctx, gradient: Float[Tensor, "*row candidate"]):
        """beta_d (g_d - sum_e beta_e g_e)."""
        (beta,) = ctx.saved_tensors
        return beta * (gradient - (beta * gradient).sum(dim=-1, keepdim=True)), None


class CandidateMask(torch.autograd.Function):
    """W * hard mask, with the gradient of the soft mask to the candidates' probabilities beta."""

    @staticmethod
    def forward(
        ctx,
        weight: Float[Tensor, "out in"],
        rank: Int[Tensor, "out in"],
        pruned: Int[Tensor, " out"],
        beta: Float[Tensor, "*row candidate"],
        cuts: Int[Tensor, " candidate"],
    ) -> Float[Tensor, "out in"]:
        """`cuts` [candidate] = floor(in * p_d)."""
        ctx.save_for_backward(weight, rank, cuts)
        ctx.shared = beta.dim() == 1
        return kernels.masked_weight(weight, rank, pruned)

    @staticmethod
    def backward(ctx, gradient: Float[Tensor, "out in"]):
        """Only beta has a gradient: the weights are frozen."""
        weight, rank, cuts = ctx.saved_tensors
        by_row = kernels.candidate_gradient(weight, gradient, rank, cuts)
        return None, None, None, by_row.sum(dim=0) if ctx.shared else by_row, None


class CandidateAllocation(nn.Module):
    """The learnable allocation of one linear: theta [out candidate], or [candidate] when the rows share it."""

    def __init__(self, weight: Tensor, importance: Tensor, per_row: bool, sigmoid: bool, step: float) -> None:
        super().__init__()
        self.weight, self.rank, self.sigmoid = weight, kernels.rank_in_row(importance), sigmoid
        candidates = float_candidates(step)
        self.candidates = candidates.to(weight.device)
        rows, self.columns = weight.shape
        self.cuts = torch.tensor([int(self.columns * p) for p in candidates.tolist()], device=weight.device)
        shape = (rows, len(self.candidates)) if per_row else (len(self.candidates),)
        self.theta = nn.Parameter(torch.zeros(shape, device=weight.device))

    def beta(self) -> Tensor:
        """The distribution over candidates [row candidate], or [candidate]."""
        logits = self.theta.sigmoid() if self.sigmoid else self.theta
        return SoftmaxInLanes.apply(logits, 16)

    def row_sparsity(self) -> Tensor:
        """alpha of every row [out]."""
        return (self.beta() @ self.candidates).expand(len(self.weight))

    def pruned(self, alpha: Tensor) -> Tensor:
        """floor(alpha * in) of every row [out]."""
        return (alpha.detach() * self.columns).long()

    @torch.no_grad()
    def keep_mask(self) -> Tensor:
        return keep_by_rank(self.rank, self.pruned(self.row_sparsity()))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The masked weight and the linear's expected sparsity."""
        beta = self.beta()
        alpha = (beta @ self.candidates).expand(len(self.weight))
        masked = CandidateMask.apply(self.weight, self.rank, self.pruned(alpha), beta, self.cuts)
        return masked, alpha.mean()
