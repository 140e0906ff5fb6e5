"""How far a block's outputs are from its targets. The first is every search's loss and the one that is reported:

    token:    mean over tokens t of  ||Y_t - Yhat_t||^2 / ||Y_t||^2
    channel:  mean over channels c of  sum_t (Y_tc - Yhat_tc)^2 / sum_t Y_tc^2

`channel` is the loss of BESA's authors' code (arXiv 2402.16880, Eq. 1), which `besa_paper` learns from. It gives every
channel the same weight, however little of the states it holds, and with it `besa` is behind Wanda on a real model;
`token` gives every token the same weight, as the next block does, which divides each token by its own size before it
reads it. Large models have massive activations (Sun et al., arXiv 2402.17762), one token of a window whose state is a
hundred times as large as the others'; on its own it is the smaller part of what is wrong with `channel`.
`experiments/real_model` has the figures.

In fp16 the gradient of such a loss is below the smallest number there is: dL/dY is about 2 error / (tokens hidden
size). `differentiate` hands it to the block as a multiple that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.machine import distributed

Hidden = Float[Tensor, "sample seq hidden"]
Loss = Callable[[Hidden, Hidden], Float[Tensor, ""]]
"""Outputs and targets of the own samples to the loss of all ranks' samples, in fp32, whose gradient is that of the own
samples' part."""

SMALLEST = 1e-30  # of a squared norm: a token or channel of zeros is not divided by zero


def token_errors(outputs: Hidden, targets: Hidden) -> Float[Tensor, "sample seq"]:
    """||Y_t - Yhat_t||^2 / ||Y_t||^2: the relative squared error of each token."""
    targets = targets.to(outputs.device).float()
    size = targets.square().sum(dim=-1).clamp(min=SMALLEST)
    return (targets - outputs.float()).square().sum(dim=-1) / size


def token_loss(outputs: Hidden, targets: Hidden) -> Float[Tensor, ""]:
    """mean_t ||Y_t - Yhat_t||^2 / ||Y_t||^2: the mean relative squared error of the tokens."""
    errors = token_errors(outputs, targets)
    return distributed.all_sum(errors.sum()) / distributed.total(errors.numel())


def weighted_errors(outputs: Hidden, targets: Hidden) -> Float[Tensor, "sample seq"]:
    """token_errors, each times the token's size relative to the mean size of its window's tokens."""
    size = targets.to(outputs.device).float().norm(dim=-1)
    return token_errors(outputs, targets) * size / size.mean(dim=-1, keepdim=True).clamp(min=SMALLEST**0.5)


def weighted_loss(outputs: Hidden, targets: Hidden) -> Float[Tensor, ""]:
    """mean over samples of  sum_t ||Y_t - Yhat_t||^2 / ||Y_t|| / sum_t ||Y_t||."""
    errors = weighted_errors(outputs, targets)
    return distributed.all_sum(errors.sum()) / distributed.total(errors.numel())


def channel_loss(outputs: Hidden, targets: Hidden) -> Float[Tensor, ""]:
    """sum(((Y - Yhat) / ||Y||_channel)^2) / hidden, the norm per channel over the tokens of all ranks: the mean
    relative squared error of the channels (BESA, Eq. 1, as the authors' code scales it)."""
    targets = targets.to(outputs.device).float()
    norm = distributed.all_norm(targets.flatten(0, 1).norm(dim=0)).clamp(min=SMALLEST**0.5)
    return distributed.all_sum(((targets - outputs.float()) / norm).square().sum()) / targets.shape[-1]


LOSSES: dict[str, Loss] = {"token": token_loss, "channel": channel_loss}
"""By the name that `pruner.loss` takes."""


def differentiate(
    loss_of: Callable[[Hidden], Float[Tensor, ""]], outputs: Hidden, product_dtype: torch.dtype
) -> tuple[Float[Tensor, ""], Hidden, Float[Tensor, ""]]:
    """The loss, a multiple of its gradient to the outputs to go on from, and of what: all gradients that follow from
    it, in fp32, are to be divided by that.

    1, but where products are fp16: then the power of two with which the largest number of the gradient is in (1/2, 1]
    (the authors' gradient scaler multiplies by 2^16 in its place)."""
    reached = outputs.detach().float().requires_grad_()
    loss = loss_of(reached)
    if not len(outputs):  # a rank that owns no sample of the batch
        return loss.detach(), torch.zeros_like(outputs), torch.ones_like(loss)
    (gradient,) = torch.autograd.grad(loss, reached)
    largest = gradient.abs().max()
    scale = torch.ones_like(largest)
    if product_dtype == torch.float16:
        scale = torch.where(largest > 0, 2.0 ** -largest.log2().ceil(), scale)
    return loss.detach(), (gradient * scale).to(outputs.dtype), scale


def gradients(outputs: Hidden, leaves: Sequence[Tensor], upstream: Hidden) -> list[Tensor]:
    """Of sum(outputs * upstream) to each of the leaves; zeros where none of the tokens reaches one, such as an expert
    of a mixture, and where this rank owns no sample of the batch."""
    if not len(outputs):
        return [torch.zeros_like(leaf) for leaf in leaves]
    return [*torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)]
