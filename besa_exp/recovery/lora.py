"""LoRA under the mask: the product of two thin factors is added to the kept weights alone.

    W = W_0 + s (B A) * M,   s = alpha / r,   B = 0 at first            (A [r, in], B [out, r])
    dL/dB = s (M * G) A^T,   dL/dA = s B^T (M * G),   G = dL/dW

LoRA (Hu et al., arXiv 2106.09685) as it is fills every zero when it is merged. With the mask inside (SQFT's SparsePEFT,
arXiv 2410.03750; PERP's MaskLoRA, arXiv 2312.15230) what is merged is what was trained. Those codes form B A in each
forward pass and leave it to autograd to keep; it is as large as W. Here W is written once a step and B A dropped, and G
comes from the model's own backward pass, one tensor at a time: there is no adapter module in the model, forward and
backward passes are the model's own, and merging is no step at all.

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
from besa_exp.recovery.keep_bits import KeepBits, parameters_of_linears, without_negative_zeros
from besa_exp.recovery.norms import norms_and_biases
from besa_exp.recovery.schedule import key_of


@dataclass(frozen=True)
class MaskedLora:
    """W = W_0 + scaling (B A) * M. `base` is W_0 at the kept places, in its own dtype; a stack of experts has a pair of
    factors for each."""

    base: Tensor
    A: Float[Tensor, "*expert rank in"]
    B: Float[Tensor, "*expert out rank"]
    scaling: float
    keep: KeepBits | None

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """The factors."""
        return {"A": self.A, "B": self.B}

    def write(self, parameter: Tensor) -> None:
        """In fp32, rounded once."""
        product = self.B @ self.A
        if self.keep is None:
            merged = self.base.view(parameter.shape).float() + self.scaling * product
            parameter.copy_(without_negative_zeros(merged.to(parameter.dtype)))
        else:
            self.keep.scatter_(self.base.float() + self.scaling * self.keep.gather(product), parameter)

    def gradients(self, gradient: Tensor) -> Mapping[str, Tensor]:
        """s B^T (M * G) and s (M * G) A^T."""
        return factor_gradients(masked(gradient, self.keep), self.A, self.B, self.scaling)


@dataclass(frozen=True)
class Lora:
    """`rank` r and `alpha`; `norms`: norms and biases are trained beside the factors, as PERP does."""

    adam: Adam = field(default_factory=lambda: Adam(lr=1e-3))
    rank: int = 16
    alpha: float = 32.0
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
            bound = 3**0.5 / parameter.shape[-1] ** 0.5  # a variance of 1 / in, whatever the rank
            A.copy_(uniform(A.shape, key_of("lora", seed, name)).mul_(bound))
            forms[name] = MaskedLora(
                kept_of(parameter, keep.get(name)), A, B.zero_(), self.alpha / self.rank, keep.get(name)
            )
        return Descent(model, forms | (norms_and_biases(model) if self.norms else {}), self.adam, keep)


def check_rank(rank: int) -> None:
    """ValueError: it is none."""
    if rank < 1:
        raise ValueError(f"recovery.rank={rank}: must be at least 1")


def factors(parameter: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Room for A and B in fp32. More columns of B than `out` or `in` would add nothing."""
    *stack, rows, columns = parameter.shape
    rank = min(rank, rows, columns)
    A = torch.empty(*stack, rank, columns, dtype=torch.float32, device=parameter.device)
    return A, torch.empty(*stack, rows, rank, dtype=torch.float32, device=parameter.device)


def factor_gradients(
    gradient: Float[Tensor, "*expert out in"],
    A: Float[Tensor, "*expert rank in"],
    B: Float[Tensor, "*expert out rank"],
    scaling: float,
) -> dict[str, Tensor]:
    """dL/dA and dL/dB where `gradient` is dL / d(scaling B A)."""
    return {"A": B.mT @ gradient * scaling, "B": gradient @ A.mT * scaling}


def masked(gradient: Tensor, keep: KeepBits | None) -> Tensor:
    """M * G in fp32."""
    return gradient.float() if keep is None else gradient.float() * keep.mask()


def kept_of(parameter: Tensor, keep: KeepBits | None) -> Tensor:
    """A copy of the kept values, or of all."""
    detached = parameter.detach()
    return detached.reshape(-1).clone() if keep is None else keep.gather(detached)


def uniform(shape: torch.Size, key: int) -> Tensor:
    """Numbers of U(-1, 1), drawn on the CPU: the same on every device."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(key)).mul_(2).sub_(1)
