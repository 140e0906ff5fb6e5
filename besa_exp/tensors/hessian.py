"""The Hessian of a linear's inputs, H = 2/n X^T X, and its Cholesky factor."""

from __future__ import annotations

import logging

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.errors import RunError

log = logging.getLogger(__name__)


def dead_inputs(hessian: Float[Tensor, "in in"]) -> Tensor:
    """Inputs that were zero on every token: their weights cannot matter."""
    return hessian.diagonal() == 0


def upper_factor(hessian: Float[Tensor, "in in"], damping: float, where: str) -> Float[Tensor, "in in"]:
    """R, upper triangular, with R R^T = H + damping * mean(diag H) I; dead inputs count with H_ii = 1. It is the
    Cholesky factor for the reversed order of inputs, and R^-1 is SparseGPT's U, U^T U = (H + ...)^-1. This takes a
    quarter of the work of inverting H and factoring the inverse, and is as near to fp64.

    If H is not positive definite, the damping is raised tenfold, at most three times, and logged. RunError: H is still
    not positive definite; `where` names the block and linear."""
    diagonal = hessian.diagonal().clone()
    diagonal[dead_inputs(hessian)] = 1
    mean = diagonal.mean()
    for attempt in range(4):
        relative = damping * 10**attempt
        if attempt:
            refused = "%s: the Hessian is not positive definite at damping %g, trying %g"
            log.warning(refused, where, relative / 10, relative)
        damped = hessian.flip(0, 1)
        damped.diagonal().copy_((diagonal + relative * mean).flip(0))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and bool(lower.diagonal().isfinite().all()):  # what is not finite in a row shows there
            return lower.flip(0, 1)
    raise RunError(
        f"{where}: the Hessian of its inputs is not positive definite even at damping {damping * 1000:g} of its mean "
        "diagonal; use more calibration tokens or a larger pruner.damping."
    )
