"""What BESA's search in a block is made of: the state that it moves, its losses and their gradients.

The effective weights of a linear are its own, or with a quantiser what they round to under the clipping of the state,
with the least important ones of every row at zero. Everything is learned from the gradient of the block's loss to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.probe import checked_gradient, finite_step, probe_loss
from besa_exp.blocks.products import Product
from besa_exp.blocks.pruner import PrunedBlock
from besa_exp.blocks.reports import Step
from besa_exp.machine import distributed
from besa_exp.methods.allocation import Rows
from besa_exp.methods.pruners.counted_linear import counted_linear
from besa_exp.tensors import kernels
from besa_exp.tensors.losses import Loss, differentiate
from besa_exp.tensors.quantisation import Quantiser, clipping_gradient, quantise


@dataclass(frozen=True)
class State:
    """The sparsity of every cell and, with a quantiser, the logits of each linear's clipping [2 out group]."""

    sparsity: Float[Tensor, " cell"]
    clipping: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All that is learned, the sparsities first."""
        return [self.sparsity, *self.clipping.values()]

    def clone(self) -> State:
        """As it is now."""
        return State(self.sparsity.clone(), {name: logits.clone() for name, logits in self.clipping.items()})

    def copy_(self, other: State) -> None:
        """Become the other, in place."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)


@dataclass(frozen=True)
class Search:
    """What the search asks of one block: losses and gradients of states that prune `total` weights of `rows`.

    `capacity`: weights of each cell. `masked` are buffers for the effective weights: leaves that every step fills
    anew. `fixed`: weights of other linears of the module, decided before."""

    block: Block
    rows: Rows
    total: int
    capacity: Float[Tensor, " cell"]
    masked: Mapping[str, Tensor]
    quantiser: Quantiser | None
    loss: Loss
    fixed: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(block: Block, rows: Rows, total: int, quantiser: Quantiser | None, loss: Loss) -> Search:
        """With buffers of its own."""
        masked = {name: torch.empty_like(weight).requires_grad_() for name, weight in rows.weights.items()}
        return Search(block, rows, total, rows.per_cell(rows.columns, rows.num_cells), masked, quantiser, loss)

    @cached_property
    def around(self) -> Float[Tensor, " weight"]:
        """One buffer for the weights of any linear that are near its cuts, made when it is first used."""
        return torch.empty_like(max(self.rows.weights.values(), key=Tensor.numel)).flatten()

    @property
    def expected(self) -> float:
        """The sparsity of the block."""
        return self.total / self.rows.num_weights

    def start(self, strength: float) -> State:
        """Uniform sparsity; clipping strengths that are all `strength`."""
        weights = self.rows.weights.items() if self.quantiser else ()
        clipping = {name: self.quantiser.logits(weight, strength) for name, weight in weights}  # type: ignore[union-attr]
        return State(torch.full_like(self.capacity, self.expected), clipping)

    def gradient(
        self, inputs: Hidden, targets: Hidden, state: State, window: float, step: int
    ) -> tuple[Step, list[Tensor]]:
        """The step's record, and dL / d(state), of the sparsities along the budget: without the part that would only
        change the total. `inputs` are this rank's of the batch; it may have none."""
        rows, counts = self._fill(state)
        by_clipping = {name: torch.zeros_like(logits) for name, logits in state.clipping.items()}

        def clip(name: str, gradient: Tensor) -> None:
            by_clipping[name] = self._clipping_gradient(name, gradient, counts[name], state.clipping[name])

        def upstream_of(outputs: Hidden) -> tuple[Tensor, Hidden, Tensor]:
            return differentiate(lambda reached: self.loss(reached, targets), outputs, self.block.product_dtype)

        loss, by_row, scale = self.by_row(inputs, rows, counts, window, upstream_of, clip if by_clipping else None)
        record = finite_step(self.block, step, loss, loss, 0.0, self.expected)
        by_row = checked_gradient(record, distributed.all_sum(by_row / scale))
        by_cell = self.rows.per_cell(by_row, len(self.capacity))
        along_budget = by_cell - self.capacity * (by_cell.sum() / self.rows.num_weights)
        return record, [along_budget, *(distributed.all_sum(found / scale) for found in by_clipping.values())]

    def by_row(
        self,
        inputs: Hidden,
        rows: Rows,
        counts: Mapping[str, Tensor],
        window: float,
        upstream_of: Callable[[Hidden], tuple[Tensor, Hidden, Tensor]],
        use: Callable[[str, Tensor], None] | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " row"], Float[Tensor, ""]]:
        """`upstream_of` makes of the outputs under the masks of `counts`, which are in the buffers, a loss, its
        gradient to them, and of what that is a multiple. Returned are loss, that multiple of the gradient to the
        sparsity of every row, this rank's part, and of what. `use` is given dL/dW of each linear. Inputs that require
        a gradient get theirs."""
        by_count = {name: torch.zeros_like(count, dtype=torch.float32) for name, count in counts.items()}
        products = self._products(counts, window, by_count)
        outputs = self.block(inputs, {**self.fixed, **self.masked}, products)
        loss, upstream, scale = upstream_of(outputs)

        def used(name: str, gradient: Tensor) -> None:
            by_count[name] += rows.count_gradient(name, gradient, counts[name], window)
            if use:
                use(name, gradient)

        if len(inputs):
            self._backward(outputs, upstream, used)
        return loss, self.rows.row_gradient(by_count), scale

    def _products(
        self, counts: Mapping[str, Tensor], window: float, by_count: Mapping[str, Tensor]
    ) -> dict[str, Product]:
        """For linears that need no dL/dW: they add to `by_count` when the loss is differentiated. With a quantiser all
        need it; and on a GPU it costs less than to read once more what the products without it make."""
        if self.quantiser or self.block.device.type != "cpu":
            return {}

        def near(name: str) -> tuple[Tensor, Tensor]:
            out = self.around[: self.rows.weights[name].numel()].view_as(self.rows.weights[name])
            return out, self.rows.weights_around(name, counts[name], window, out)

        products = {}
        for name, into in by_count.items():
            count = torch.zeros_like(into, requires_grad=True)
            count.grad = into
            products[name] = partial(counted_linear, count=count, near=partial(near, name))
        return products

    def _backward(self, outputs: Hidden, upstream: Hidden, use: Callable[[str, Tensor], None]) -> None:
        """Gives `use` dL/dW of each linear that is not among `_products`, as it is known, one at a time: together they
        take as much as the block."""

        def used(name: str, weight: Tensor) -> None:
            assert weight.grad is not None
            use(name, weight.grad)
            weight.grad = None

        hooks = [weight.register_post_accumulate_grad_hook(partial(used, name)) for name, weight in self.masked.items()]
        try:
            outputs.backward(upstream)
        finally:
            for hook in hooks:
                hook.remove()

    def probe_loss(self, inputs: Hidden, targets: Hidden, state: State) -> float:
        """The loss of the samples that are not learned from."""
        self._fill(state)
        return probe_loss(self.block, inputs, targets, {**self.fixed, **self.masked}, self.loss)

    def weights(self, state: State) -> dict[str, Tensor]:
        """The effective weights of a state, by linear."""
        self._fill(state)
        return {name: weight.detach() for name, weight in self.masked.items()}

    def pruned(self, state: State, loss_before: float, steps: list[Step]) -> PrunedBlock:
        """What a state makes of the block. Kept weights that round to zero count as pruned."""
        rows = self._rounded(state)
        counts = rows.counts(state.sparsity, self.total)
        keep_masks = rows.keep_masks(counts)
        if self.quantiser:
            keep_masks = {name: mask & (rows.weights[name] != 0) for name, mask in keep_masks.items()}
        return PrunedBlock(
            keep_masks=keep_masks,
            allocated=rows.sparsity(counts),
            weights=rows.weights if self.quantiser else None,
            loss_before=loss_before,
            steps=tuple(steps),
        )

    @torch.no_grad()
    def _fill(self, state: State) -> tuple[Rows, dict[str, Tensor]]:
        """The effective weights into the buffers; the rows with the weights before masking, and the counts."""
        rows = self._rounded(state)
        counts = rows.counts(state.sparsity, self.total)
        rows.masked_into(self.masked, counts)
        return rows, counts

    def _rounded(self, state: State) -> Rows:
        if self.quantiser is None:
            return self.rows
        weights = self.rows.weights.items()
        return replace(
            self.rows, weights={name: quantise(W, self.quantiser, state.clipping[name]) for name, W in weights}
        )

    def _clipping_gradient(self, name: str, gradient: Tensor, count: Tensor, logits: Tensor) -> Tensor:
        """dL / d(logits) of a linear: pruned weights have no part in it."""
        kept = kernels.masked_weight(gradient, self.rows.ranks[name], count)
        return clipping_gradient(self.rows.weights[name], kept, self.quantiser, logits)  # type: ignore[arg-type]
