"""Importance: a score for every weight of a linear [out, in]; the lowest are pruned first. All in fp32."""

from __future__ import annotations

import logging

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.errors import RunError

log = logging.getLogger(__name__)


def magnitude_importance(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """|W|."""
    return weight.float().abs()


def wanda_importance(weight: Float[Tensor, "out in"], squared_norm: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """|W_ij| ||X_j||_2 (Wanda, arXiv 2306.11695, Eq. 1)."""
    return weight.float().abs() * squared_norm.sqrt()


def rounded_importance(
    weight: Float[Tensor, "out in"], rounded: Float[Tensor, "out in"], squared_norm: Float[Tensor, " in"]
) -> Float[Tensor, "out in"]:
    """(W_ij^2 - (W_ij - Q_ij)^2) ||X_j||^2: how much of the squared error that pruning makes is spared by keeping what
    the weight rounds to. Without rounding that is Wanda's importance squared; what rounds to zero spares nothing."""
    weight, rounded = weight.float(), rounded.float()
    return rounded * (2 * weight - rounded) * squared_norm


def ria_importance(
    weight: Float[Tensor, "out in"], squared_norm: Float[Tensor, " in"], power: float = 0.5
) -> Float[Tensor, "out in"]:
    """(|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) ||X_j||^power (RIA, Zhang et al., ICLR 2024); rows and columns of
    zeros count 0."""
    size = weight.float().abs()
    smallest = torch.finfo(size.dtype).tiny
    of_row, of_column = (size / size.sum(dim=axis, keepdim=True).clamp(min=smallest) for axis in (1, 0))
    return (of_row + of_column) * squared_norm.pow(power / 2)


def obs_importance(
    weight: Float[Tensor, "out in"], factor: Float[Tensor, "in in"], squared: bool = True
) -> Float[Tensor, "out in"]:
    """W_ij^2 / U_jj^2, the rise of the squared error when weight ij goes (SparseGPT, arXiv 2301.00774, Eq. 2). BESA's
    authors divide by U_jj instead (`squared=False`). `factor` is R of `upper_factor`: 1 / U_jj = R_jj."""
    diagonal = factor.diagonal()
    return weight.float().square() * (diagonal.square() if squared else diagonal)


def dead_inputs(hessian: Float[Tensor, "in in"]) -> Tensor:
    """Inputs that were zero on every token: their weights cannot matter."""
    return hessian.diagonal() == 0


def upper_factor(hessian: Float[Tensor, "in in"], damping: float, where: str) -> Float[Tensor, "in in"]:
    """R, upper triangular, with R R^T = H + damping * mean(diag H) I; dead inputs count with H_ii = 1. It is the
    Cholesky factor for the reversed order of inputs, and R^-1 is SparseGPT's U, U^T U = (H + ...)^-1: a quarter of
    the work of inverting H and factoring the inverse, and as near to fp64.

    The damping is raised tenfold, at most three times, and logged, when H is not positive definite. RunError: still
    not, `where` names the block and linear."""
    diagonal = hessian.diagonal().clone()
    diagonal[dead_inputs(hessian)] = 1
    mean = diagonal.mean()
    for attempt in range(4):
        relative = damping * 10**attempt
        damped = hessian.flip(0, 1)
        damped.diagonal().copy_((diagonal + relative * mean).flip(0))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and bool(lower.diagonal().isfinite().all()):  # what is not finite in a row shows there
            return lower.flip(0, 1)
        log.warning("%s: the Hessian is not positive definite at damping %g, trying %g", where, relative, relative * 10)
    raise RunError(
        f"{where}: the Hessian of its inputs is not positive definite even at damping {damping * 1000:g} of its mean "
        "diagonal; use more calibration tokens or a larger pruner.damping."
    )
