"""ADMM under a given mask (Boza, arXiv 2401.02938), polished by conjugate gradients (ALPS, arXiv 2406.07831).

The kept weights of a linear shall give the dense outputs again:

    minimise ||X (W_hat - W)^T||^2   subject to W_hat = 0 where it is pruned.

With G = X^T X scaled to a unit diagonal (inputs divided by their norms, weights multiplied by them), damped and
factored once for all rows and iterations,

    Z <- keep_mask * (W_hat + U),   U <- U + W_hat - Z,   W_hat <- (W G + rho (Z - U)) (G + rho I)^-1,

rho = 1, beginning with W_hat = W and U = 0, ending with Z once more. Then conjugate gradients go on from Z within the
kept weights, all rows at once. Boza also chooses the mask as the iterations go; here the pruner has chosen it. ALPS
damps by a hundredth of the mean diagonal before the scaling; here both steps work with Boza's damping.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from besa_exp.blocks.pruner import PrunedBlock, Task, Traits
from besa_exp.errors import RunError
from besa_exp.rules import CountOrZero, Positive, check_fields
from besa_exp.tensors.statistics import Hessian, by_shared_input

RHO = 1.0


def admm(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    lower: Float[Tensor, "in in"],
    keep_mask: Bool[Tensor, "out in"],
    iterations: int,
) -> Float[Tensor, "out in"]:
    """Z after `iterations`. `lower` is the Cholesky factor of G + rho I."""
    fitted = weight @ gram
    W_hat, U = weight, torch.zeros_like(weight)
    for _ in range(iterations):
        Z = (W_hat + U) * keep_mask
        U = U + W_hat - Z
        W_hat = torch.cholesky_solve((fitted + RHO * (Z - U)).T, lower).T
    return (W_hat + U) * keep_mask


def polish(
    start: Float[Tensor, "out in"],
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    keep_mask: Bool[Tensor, "out in"],
    iterations: int,
) -> Float[Tensor, "out in"]:
    """Conjugate gradients on the kept weights, each row a system of its own, preconditioned by G's unit diagonal."""
    found = start * keep_mask
    residual = ((weight - found) @ gram) * keep_mask
    direction, squared = residual.clone(), residual.square().sum(dim=1, keepdim=True)
    smallest = torch.finfo(residual.dtype).tiny
    for _ in range(iterations):
        image = (direction @ gram) * keep_mask
        step = squared / (direction * image).sum(dim=1, keepdim=True).clamp(min=smallest)
        found = found + step * direction
        residual = residual - step * image
        now = residual.square().sum(dim=1, keepdim=True)
        direction = residual + (now / squared.clamp(min=smallest)) * direction
        squared = now
    return found


@dataclass(frozen=True)
class Admm:
    """`damping` is relative to the unit diagonal of G, so to each input's own squared norm; `iterations` of ADMM, then
    `polishing` ones."""

    damping: Positive = 0.1
    iterations: CountOrZero = 20
    polishing: CountOrZero = 10

    traits = Traits(Hessian)

    def __post_init__(self) -> None:
        check_fields(self, "update")

    def check(self, pattern: str) -> list[str]:
        return []

    def update_block(self, task: Task, pruned: PrunedBlock) -> PrunedBlock:
        """From the dense weights, one factor for each shared input. RunError: G is not positive definite."""
        weights = {}
        for hessian, names in by_shared_input(task.statistics):
            matrix = hessian.matrix
            norm = matrix.diagonal().sqrt()
            norm = torch.where(norm > 0, norm, 1.0)  # dead inputs
            gram = matrix / norm[:, None] / norm
            gram.diagonal().fill_(1 + self.damping)
            lower, failed = torch.linalg.cholesky_ex(gram + RHO * torch.eye(len(gram), device=gram.device))
            if failed:
                raise RunError(
                    f"{task.block.name}.{names[0]}: the Gram matrix of its inputs is not positive definite; use more "
                    "calibration tokens or a larger update.damping"
                )
            for name in names:
                dense, keep_mask = task.weights[name].float() * norm, pruned.keep_masks[name]
                found = admm(dense, gram, lower, keep_mask, self.iterations)
                weights[name] = polish(found, dense, gram, keep_mask, self.polishing) / norm
        return replace(pruned, weights=weights)
