"""The products of a block's linears: which routine computes them, and what may take its place.

In fp32 on a CPU PyTorch gives them to MKL, which has no AVX-512 for CPUs of other makers than Intel's; oneDNN, which
comes with PyTorch too, compiles its own for whatever the CPU has. A linear's product is oneDNN's here, and so is the
gradient to its inputs, which is a linear's product as well; the gradient to its weights is faster in MKL.
`experiments/benchmarks/README.md` has the figures. Results differ by fp32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from besa_exp.blocks.linears import Linear, replaced_forwards

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""inputs [*token in], weight [out in] and bias [out] or None to outputs [*token out]."""

FEW = 1 << 23  # multiplications of a product: with fewer, oneDNN's call takes longer than it gains
HAS_ONEDNN = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(
    inputs: Float[Tensor, "*token in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*token out"]:
    """inputs @ weight.T + bias, by the fastest routine there is. Differentiable, once."""
    if not _for_onednn(inputs, weight):
        return nn.functional.linear(inputs, weight, bias)
    return _OneDNN.apply(inputs, weight, bias)


def is_plain(linear: Linear) -> bool:
    """Whether all that a linear computes is a product with its weight and its bias added: not of a subclass's making,
    nor a part of a stack."""
    return type(linear.module) is nn.Linear and "forward" not in vars(linear.module)


@contextmanager
def computed_by(linears: Mapping[str, Linear], products: Mapping[str, Product]) -> Iterator[None]:
    """For a while plain linears compute what `products` says; those without one there, by `product`. Under autocast,
    which casts what PyTorch's own routine is given, only `products` take its place."""
    autocast = any(torch.is_autocast_enabled(linear.weight.device.type) for linear in [*linears.values()][:1])
    replaced = {
        linear.module: products.get(name, product)
        for name, linear in linears.items()
        if is_plain(linear) and (name in products or not autocast)
    }
    forwards = [partial(_forward, module, own) for module, own in replaced.items()]
    with replaced_forwards([*replaced], forwards):
        yield


def _forward(module: Any, own: Product, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's name for it
    return own(input, module.weight, module.bias)


def _for_onednn(inputs: Tensor, weight: Tensor) -> bool:
    return (
        HAS_ONEDNN
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.device.type == weight.device.type == "cpu"
        and inputs.numel() * len(weight) >= FEW
    )


class _OneDNN(torch.autograd.Function):
    """oneDNN's product, which autograd does not know."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        by_input, by_weight, by_bias = ctx.needs_input_grad
        tokens = gradient.flatten(0, -2)
        return (
            product(gradient, weight.T) if by_input else None,
            tokens.T @ inputs.flatten(0, -2) if by_weight else None,
            tokens.sum(dim=0) if by_bias else None,
        )
