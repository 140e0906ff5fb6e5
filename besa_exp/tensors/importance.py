"""Importance: a score for every weight of a linear [out, in]; the lowest are pruned first. All in fp32."""

from __future__ import annotations

import logging

import torch
from jaxtyping import Float
from torch import Tensor

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
    """(W_ij^2 - (W_ij - Q_ij)^2) ||X_j||^2: how much smaller the squared error is if the rounded weight is kept and not
    pruned. Without rounding that is Wanda's importance squared; for a weight that rounds to zero it is 0."""
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
