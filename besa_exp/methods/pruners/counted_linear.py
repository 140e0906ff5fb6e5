"""A masked linear that knows the gradient to its rows' counts without the gradient to its weights.

What a search of counts asks of dL/dW is, for each output o, its sum with the weights around the cut,

  sum_j V_oj dL/dW_oj = sum_t dL/dY_to sum_j V_oj X_tj,     V = W around the cut, zero elsewhere,

and the right side needs one product X V^T in the place of the product dL/dY^T X: as many multiplications, but its
result has the size of the outputs, not of the weights, and nothing has to be gone through weight by weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.blocks.products import product


def counted_linear(
    inputs: Float[Tensor, "*token in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    count: Float[Tensor, " out"],
    near: Callable[[], tuple[Float[Tensor, "out in"], Float[Tensor, " out"]]],
) -> Float[Tensor, "*token out"]:
    """inputs @ weight.T + bias, in what autocast says. Differentiable in the inputs and in `count`, whose values are
    not used; the gradient to it is fp32: - sum_j V_oj dL/dW_oj / width_o for the V and width that `near` gives, when it
    is asked."""
    device = inputs.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
    weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    return _CountedLinear.apply(inputs.to(dtype), weight, bias, count, near)


class _CountedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        count: Tensor,
        near: Callable[[], tuple[Tensor, Tensor]],
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.near = near
        return product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor, None]:
        inputs, weight = ctx.saved_tensors
        near, width = ctx.near()
        parts = product(inputs, near.to(inputs.dtype)).flatten(0, -2).float()
        by_count = parts.mul_(gradient.flatten(0, -2)).sum(dim=0) / -width
        return product(gradient, weight.T) if ctx.needs_input_grad[0] else None, None, None, by_count, None
