"""Weight-only quantisation: round to nearest on 2^bits evenly spaced values per row, or per group of a row's inputs.

With low = min(W, 0) and high = max(W, 0) of the group, each under a clipping strength in (0, 1),

    h = (s_high high - s_low low) / L,  L = 2^bits - 1,  z = round(-s_low low / h),
    Q(W) = (clip(round(W / h) + z, 0, L) - z) h

The strengths are sigmoids of logits, learned through the rounding as if it were not there: OmniQuant's learnable weight
clipping (arXiv 2308.13137, Section 3.2), which BESA's joint compression follows. Unlike there the range always holds
zero, so that zero is one of the values: a pruned weight stays exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from besa_exp.rules import Count, check_fields, within


@dataclass(frozen=True)
class Quantiser:
    """`group_size`: consecutive inputs of a row that share their scale; None: the whole row, an output channel. A
    row's last group may be smaller."""

    bits: Annotated[int, within(least=2, most=8)] = 4
    group_size: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self, "pruner.quantiser")

    def logits(self, weight: Float[Tensor, "out in"], strength: float) -> Float[Tensor, "2 out group"]:
        """Logits of equal strengths in (0, 1) for all groups: of the lower ends, then of the upper ones."""
        shape = (2, *_grouped(weight, self.group_size).shape[:2])
        return torch.full(shape, strength, device=weight.device).logit()


def quantise(
    weight: Float[Tensor, "out in"], quantiser: Quantiser, logits: Float[Tensor, "2 out group"] | None = None
) -> Float[Tensor, "out in"]:
    """Q(W) as plain numbers in the weight's dtype, computed in fp32. Without `logits` nothing is clipped."""
    grouped = _grouped(weight, quantiser.group_size)
    scale, zero, levels = _scale_and_zero(grouped, quantiser, logits)
    rounded = ((grouped / scale).round() + zero).clamp(0, levels)
    return ((rounded - zero) * scale).flatten(1)[:, : weight.shape[1]].to(weight.dtype)


def rounded(
    weight: Float[Tensor, "out in"], quantiser: Quantiser, logits: Float[Tensor, "2 out group"]
) -> Float[Tensor, "out in"]:
    """`quantise`, differentiable in the logits by `clipping_gradient`; the weight is constant."""
    return _Rounded.apply(logits, weight, quantiser)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, weight: Tensor, quantiser: Quantiser) -> Tensor:
        ctx.save_for_backward(logits, weight)
        ctx.quantiser = quantiser
        return quantise(weight, quantiser, logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, weight = ctx.saved_tensors
        return clipping_gradient(weight, gradient, ctx.quantiser, logits), None, None


def clipping_gradient(
    weight: Float[Tensor, "out in"],
    gradient: Float[Tensor, "out in"],
    quantiser: Quantiser,
    logits: Float[Tensor, "2 out group"],
) -> Float[Tensor, "2 out group"]:
    """dL / d(logits) where `gradient` is dL / dQ(W), rounding passed straight through and z held:

    dQ / dh = round(W / h) - W / h inside the range, -z below and L - z above it."""
    grouped = _grouped(weight, quantiser.group_size)
    scale, zero, levels = _scale_and_zero(grouped, quantiser, logits)
    place = grouped / scale
    rounded = place.round() + zero
    inside = (rounded >= 0) & (rounded <= levels)
    by_scale = rounded.clamp_(0, levels).sub_(zero).sub_(place.mul_(inside))
    total = (_grouped(gradient, quantiser.group_size) * by_scale).sum(dim=-1)
    strength = logits.sigmoid()
    low, high = _range(grouped)
    return total * torch.stack([-low, high]) / levels * strength * (1 - strength)


def _range(grouped: Float[Tensor, "out group size"]) -> tuple[Float[Tensor, "out group"], Float[Tensor, "out group"]]:
    return grouped.amin(dim=-1).clamp(max=0), grouped.amax(dim=-1).clamp(min=0)


def _scale_and_zero(
    grouped: Float[Tensor, "out group size"], quantiser: Quantiser, logits: Float[Tensor, "2 out group"] | None
) -> tuple[Float[Tensor, "out group 1"], Float[Tensor, "out group 1"], int]:
    """h, z and L; a group of zeros has h = 1."""
    low, high = _range(grouped)
    if logits is not None:
        of_low, of_high = logits.sigmoid()
        low, high = low * of_low, high * of_high
    levels = 2**quantiser.bits - 1
    scale = (high - low) / levels
    scale = torch.where(scale > 0, scale, 1.0)
    return scale[..., None], (-low / scale).round()[..., None], levels


def _grouped(weight: Float[Tensor, "out in"], group_size: int | None) -> Float[Tensor, "out group size"]:
    """In fp32, the last group filled up with zeros, which are in every range."""
    columns = weight.shape[1]
    size = min(group_size or columns, columns)
    return nn.functional.pad(weight.float(), (0, -columns % size)).unflatten(1, (-1, size))
