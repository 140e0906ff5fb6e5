"""Multiplied LoRA: each kept weight is scaled by an entry of a product of two thin factors.

    W = W_0 * (B A),   B A = 1 at first                                   (A [r, in], B [out, r])
    dL/dB = (W_0 * G) A^T,   dL/dA = B^T (W_0 * G),   G = dL/dW

PERP's ScaleLoRA (Zimmer et al., arXiv 2312.15230), HiRA in other papers. What is 0 stays 0, as 0 * anything; places are
still taken from the mask and not from W_0, so that -0.0 is written nowhere.

PERP begins with all entries 1 / sqrt(r). The r columns of B, and the r rows of A, are then equal, get equal gradients
and stay equal: whatever r says, B A has rank 1. Here the first column and row are ones, and the others begin as LoRA's
do, A at random and B at 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from besa_exp.recovery.descent import Adam, Descent, Form
from besa_exp.recovery.keep_bits import KeepBits, parameters_of_linears, without_negative_zeros
from besa_exp.recovery.lora import check_rank, factor_gradients, factors, kept_of, uniform
from besa_exp.recovery.norms import norms_and_biases
from besa_exp.recovery.schedule import key_of


@dataclass(frozen=True)
class Scaled:
    """W = W_0 * (B A). `base` is W_0 at the kept places, in its own dtype."""

    base: Tensor
    A: Float[Tensor, "*expert rank in"]
    B: Float[Tensor, "*expert out rank"]
    keep: KeepBits | None

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """The factors."""
        return {"A": self.A, "B": self.B}

    def write(self, parameter: Tensor) -> None:
        """In fp32, rounded once."""
        product = self.B @ self.A
        if self.keep is None:
            merged = self.base.view(parameter.shape).float() * product
            parameter.copy_(without_negative_zeros(merged.to(parameter.dtype)))
        else:
            self.keep.scatter_(self.base.float() * self.keep.gather(product), parameter)

    def gradients(self, gradient: Tensor) -> Mapping[str, Tensor]:
        """B^T (W_0 * G) and (W_0 * G) A^T."""
        if self.keep is None:
            base = self.base.view(gradient.shape).float()
        else:
            base = torch.zeros(gradient.shape, dtype=torch.float32, device=gradient.device)
            self.keep.scatter_(self.base, base)
        return factor_gradients(base * gradient, self.A, self.B, 1.0)


@dataclass(frozen=True)
class Scale:
    """`rank` r; `norms`: norms and biases are trained beside the factors."""

    adam: Adam = field(default_factory=lambda: Adam(lr=1e-3))
    rank: int = 16
    norms: bool = True

    def __post_init__(self) -> None:
        check_rank(self.rank)

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Any model."""
        return []

    def begin(self, model: nn.Module, keep: Mapping[str, KeepBits], seed: int) -> Descent:
        """A pair of factors for each linear of the blocks."""
        forms: dict[str, Form] = {}
        for name, parameter in parameters_of_linears(model).items():
            A, B = factors(parameter, self.rank)
            A.copy_(uniform(A.shape, key_of("scale", seed, name)).mul_((3 / self.rank) ** 0.5))
            A[..., 0, :], B[..., 0] = 1, 1
            B[..., 1:] = 0
            forms[name] = Scaled(kept_of(parameter, keep.get(name)), A, B, keep.get(name))
        return Descent(model, forms | (norms_and_biases(model) if self.norms else {}), self.adam, keep)
