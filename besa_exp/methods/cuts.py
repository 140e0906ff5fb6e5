"""A block under hard masks, differentiable in where they cut.

    W_hat = W where rank >= k[row], else 0                                     (BESA, Eq. 3)
    dL/dk[row] = - mean over the ranks in a window around k of W dL/dW_hat     (straight through the mask)

`cut_block` computes both, in one of three ways that give the same but for rounding:

- `StraightThrough` is the reference: the mask is an operation of autograd's, whose backward pass is the second line.
- On a CPU, linears are computed by `counted_linear`, which never forms dL/dW_hat. With V = W in the window, else 0,

      sum_j V_oj dL/dW_oj = sum_t dL/dY_to sum_j V_oj X_tj,

  whose right side needs the product X V^T in place of dL/dY^T X: as many multiplications, but the result has the size
  of the outputs, not of the weights.
- On a GPU, where that costs more than it spares, the mask is applied just before each linear's product, so that
  autograd holds the dL/dW_hat of one linear at a time: all of them take as much memory as the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.linears import in_one_piece, room_like, stacked
from besa_exp.blocks.products import is_plain, product
from besa_exp.methods.allocation import Rows
from besa_exp.tensors import kernels


@dataclass(frozen=True)
class Buffers:
    """Room that every step uses again: for the masked weights of each linear, and for the weights around the cuts of
    any of them. `together`: names of linears, those that are masked in one pass in one list."""

    masked: Mapping[str, Tensor]
    around: Tensor
    together: Sequence[Sequence[str]]

    @staticmethod
    def like(weights: Mapping[str, Tensor]) -> Buffers:
        largest = max(weights.values(), key=Tensor.numel)
        room = largest.numel() if largest.device.type == "cpu" else 0
        masked = room_like(weights)
        together: list[list[str]] = []
        for names in in_one_piece(masked):
            together += [names] if masked[names[0]].is_contiguous() else [[name] for name in names]
        return Buffers(masked, largest.new_empty(room), together)

    @torch.no_grad()
    def fill(self, rows: Rows, counts: Mapping[str, Int[Tensor, " _out"]]) -> dict[str, Float[Tensor, "_out _in"]]:
        """W_hat of every linear, which holds until the next call."""
        for names in self.together:
            weight, rank, count, out = (_whole(own, names) for own in (rows.weights, rows.ranks, counts, self.masked))
            kernels.masked_weight(weight, rank, count, out=out)
        return dict(self.masked)


def cut_block(
    block: Block, inputs: Hidden, rows: Rows, counts: Mapping[str, Int[Tensor, " _out"]], window: float, room: Buffers
) -> tuple[Hidden, list[Float[Tensor, " _out"]]]:
    """The block's outputs under the masks of `counts`, and for each linear a tensor to differentiate them in, which
    stands for k. `window`: ranks around the cut, as a fraction of all. Weights of `rows` that require a gradient get
    theirs too, that of the kept ones."""
    masked = room.fill(rows, counts)
    cuts = {name: torch.zeros_like(count, dtype=torch.float32, requires_grad=True) for name, count in counts.items()}
    weights, products = dict(masked), {}
    for names in room.together:
        name, levels = names[0], rows.num_levels(names[0])
        weight, rank, count, own = (_whole(values, names) for values in (rows.weights, rows.ranks, counts, masked))
        at = _Cut(rank, count, max(window * levels, rows.narrowest), levels, own)
        cut = cuts[name] if len(names) == 1 else torch.cat([cuts[one] for one in names])
        if len(names) > 1:
            found = StraightThrough.apply(cut, weight, at).split(len(masked[name]))
            weights |= zip(names, found, strict=True)
        elif not is_plain(block.linears[name]):
            weights[name] = StraightThrough.apply(cut, weight, at)
        elif weight.requires_grad or block.device.type != "cpu":
            products[name] = partial(_masked_linear, cut=cut, dense=weight, at=at)
        else:
            around = room.around[: weight.numel()].view_as(weight)
            products[name] = partial(counted_linear, count=cut, near=partial(_weights_around, weight, at, around))
    return block(inputs, weights, products), [cuts[name] for name in rows.weights]


def _whole(values: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """The rows of all these linears, one linear after the other: no copy where they lie so."""
    return values[names[0]] if len(names) == 1 else stacked([values[name] for name in names]).flatten(0, 1)


@dataclass(frozen=True)
class _Cut:
    """Where the rows of a linear are cut: `window` and `levels` in ranks. `masked` are the weights under the mask."""

    rank: Tensor
    pruned: Tensor
    window: float
    levels: int
    masked: Tensor


class StraightThrough(torch.autograd.Function):
    """The masked weight, whose gradient to the cut passes straight through the mask."""

    @staticmethod
    def forward(ctx: Any, cut: Tensor, weight: Tensor, at: _Cut) -> Tensor:
        """W_hat, filled before."""
        ctx.save_for_backward(weight)
        ctx.at = at
        return at.masked.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """dL/dk, and dL/dW of the weights that are kept."""
        (weight,), at = ctx.saved_tensors, ctx.at
        by_weight = kernels.masked_weight(gradient, at.rank, at.pruned) if ctx.needs_input_grad[1] else None
        return count_gradient(weight, gradient, at.rank, at.pruned, at.window, at.levels), by_weight, None


def count_gradient(
    weight: Float[Tensor, "out in"],
    gradient: Float[Tensor, "out in"],
    rank: Int[Tensor, "out in"],
    pruned: Int[Tensor, " out"],
    window: float,
    levels: int,
) -> Float[Tensor, " out"]:
    """dL / d(levels pruned) of each row. Where ranks are those of groups, a row's is the sum of its groups'."""
    groups = weight.shape[1] // levels
    weight, gradient, rank = (values.reshape(-1, levels) for values in (weight, gradient, rank))
    by_group = kernels.count_gradient(weight, gradient, rank, pruned.repeat_interleave(groups), window)
    return by_group.view(-1, groups).sum(dim=1)


def _weights_around(weight: Tensor, at: _Cut, out: Tensor) -> tuple[Tensor, Tensor]:
    return out, kernels.weights_around(weight, at.rank, at.pruned, at.window, at.levels, out)


def _masked_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, cut: Tensor, dense: Tensor, at: _Cut) -> Tensor:
    """A linear that masks its weight itself; the one that it is given is not used."""
    compute = nn.functional.linear if torch.is_autocast_enabled(inputs.device.type) else product
    return compute(inputs, StraightThrough.apply(cut, dense, at), bias)


def counted_linear(
    inputs: Float[Tensor, "*token in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    count: Float[Tensor, " out"],
    near: Callable[[], tuple[Float[Tensor, "out in"], Float[Tensor, " out"]]],
) -> Float[Tensor, "*token out"]:
    """inputs @ weight.T + bias, in the dtype that autocast asks for. Differentiable in the inputs and in `count`, whose
    values are not used; the gradient to it is fp32: - sum_j V_oj dL/dW_oj / width_o for the V and width that `near`
    returns when it is asked."""
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
        around, width = ctx.near()
        parts = product(inputs, around.to(inputs.dtype)).flatten(0, -2).float()
        by_count = parts.mul_(gradient.flatten(0, -2)).sum(dim=0) / -width
        return product(gradient, weight.T) if ctx.needs_input_grad[0] else None, None, None, by_count, None
