"""LoRA under the mask: the product of two thin factors moves the kept weights alone, added to them or multiplied.

    lora:   W = W_0 + s (B A) * M,   s = alpha / r,   B = 0 at first          dL/d(B A) = s (M * G)
    scale:  W = W_0 * (B A),                          B A = 1 at first        dL/d(B A) = W_0 * G
    dL/dB = dL/d(B A) A^T,   dL/dA = B^T dL/d(B A),   G = dL/dW               (A [r, in], B [out, r])

LoRA (Hu et al., arXiv 2106.09685) as it is fills every zero when it is merged. With the mask inside (SQFT's SparsePEFT,
arXiv 2410.03750; PERP's MaskLoRA, arXiv 2312.15230) what is merged is what was trained. `scale` is PERP's ScaleLoRA
(HiRA multiplies by 1 + B A): what is 0 stays 0, and places still come from the mask, so that -0.0 is written nowhere.
PERP begins it with all entries 1 / sqrt(r); the r columns of B, and the r rows of A, then get equal gradients and stay
equal, so that B A has rank 1 whatever r says. Here the first column and row are ones, the other columns of B are 0 and
the other rows of A are drawn. Draws are uniform, of a variance of 1 / in (`lora`; three times PEFT's) or 1 / r
(`scale`).

Those codes form B A in each forward pass and leave it to autograd to keep; it is as large as W. Here W is written once
a step and B A dropped, and G comes from the model's own backward pass, one tensor at a time: there is no adapter module
in the model, forward and backward passes are the model's own, and merging is no step at all.

Bytes a parameter with bf16 weights of which a share k is kept: 2 (W) + 1/8 (bits) + 2 k (W_0 at the kept places), and
the factors. A step costs the products of full tuning: G must be whole before it can be masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from besa_exp.recovery.descent import Adam, Descent, Form
from besa_exp.recovery.full import norms_and_biases
from besa_exp.recovery.keep_bits import parameters_of_linears
from besa_exp.recovery.schedule import key_of
from besa_exp.rules import Count, Positive, check_fields
from besa_exp.tensors.keep_bits import KeepBits, kept_values, put_kept


@dataclass(frozen=True)
class Factored:
    """W = W_0 + scaling (B A) * M, or W_0 * (B A) where `scaling` is None. `base` is W_0 at the kept places, in its own
    dtype; a stack of experts has a pair of factors for each."""

    base: Tensor
    A: Float[Tensor, "*expert rank in"]
    B: Float[Tensor, "*expert out rank"]
    keep: KeepBits | None
    scaling: float | None = None

    @property
    def trained(self) -> Mapping[str, Tensor]:
        return {"A": self.A, "B": self.B}

    def write(self, parameter: Tensor) -> None:
        """In fp32, rounded once."""
        product, base = kept_values(self.B @ self.A, self.keep), self.base.float()
        merged = base * product if self.scaling is None else base + self.scaling * product
        put_kept(merged, parameter, self.keep)

    def gradients(self, gradient: Tensor) -> Mapping[str, Tensor]:
        found, scaling = gradient.float(), 1.0
        if self.scaling is None:
            dense = torch.zeros_like(found)
            put_kept(self.base, dense, self.keep)
            found = dense * found
        else:
            found, scaling = found if self.keep is None else found * self.keep.mask(), self.scaling
        return {"A": self.B.mT @ found * scaling, "B": found @ self.A.mT * scaling}


@dataclass(frozen=True)
class Lora:
    """`rank` r and `alpha`, None: the factors multiply the weights (`scale`); `norms`: norms and biases are trained
    beside the factors, as PERP does, which gives the head factors too."""

    adam: Adam = field(default_factory=lambda: Adam(lr=3e-3))
    rank: Count = 16
    alpha: Positive | None = 32.0
    norms: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "recovery")

    def begin(self, model: nn.Module, keep: Mapping[str, KeepBits], seed: int) -> Descent:
        """A pair of factors for each linear of the blocks, and norms and biases where they are trained too."""

        def form(name: str, parameter: Tensor) -> Factored:
            A, B = factors(parameter, self.rank)
            if self.alpha is None:
                A.copy_(uniform(A.shape, key_of("scale", seed, name)).mul_((3 / self.rank) ** 0.5))
                A[..., 0, :], B[..., 0] = 1, 1
                B[..., 1:] = 0
            else:
                bound = 3**0.5 / parameter.shape[-1] ** 0.5  # a variance of 1 / in, whatever the rank
                A.copy_(uniform(A.shape, key_of("lora", seed, name)).mul_(bound))
                B.zero_()
            scaling = None if self.alpha is None else self.alpha / self.rank
            base = kept_values(parameter.detach(), keep.get(name)).clone()
            return Factored(base, A, B, keep.get(name), scaling)

        forms: dict[str, Form] = {name: form(name, own) for name, own in parameters_of_linears(model).items()}
        return Descent(model, forms | (norms_and_biases(model) if self.norms else {}), self.adam, keep)


def factors(parameter: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Room for A and B in fp32. More columns of B than `out` or `in` would add nothing."""
    *stack, rows, columns = parameter.shape
    rank = min(rank, rows, columns)
    A = torch.empty(*stack, rank, columns, dtype=torch.float32, device=parameter.device)
    return A, torch.empty(*stack, rows, rank, dtype=torch.float32, device=parameter.device)


def uniform(shape: torch.Size, key: int) -> Tensor:
    """Numbers of U(-1, 1), drawn on the CPU: the same on every device."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(key)).mul_(2).sub_(1)
