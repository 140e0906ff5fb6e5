"""BESA (Xu et al., arXiv 2402.16880) without the limits of its published code: the default pruner.

The idea is the paper's: within each block the sparsity of every row (or linear) is a parameter, learned by gradient
descent on the block's reconstruction loss (Eq. 1) through hard masks that prune the least important weights of the row
(importance |W| ||X||), straight through the mask. What differs, and why:

- The parameter is the row's sparsity itself, not logits over D + 1 candidates: any sparsity in [0, 1] can be reached,
  where softmax(sigmoid(.)) stays in [0.376, 0.624], and every row starts at the target, not at 0.5.
- The block's budget is a constraint, not a penalty (Eq. 5): after every step the sparsities are projected onto it, and
  the counts are rounded to integers whose sum is exact. There is no lambda, and the target is met at every step.
- The gradient looks at the ranks around the cut, the weights that could go or stay next; the candidates' soft mask
  spreads over the whole row.
- Some calibration samples (the probe) are not learned from. They judge halfway and at the end: a state that does not
  lower their loss is dropped for the best so far, and the step size shrinks. So a block is never worse on them than
  where it began: at the uniform allocation, which is Wanda at the exact budget. Their passes cost what the steps on
  them would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from besa_exp import distributed
from besa_exp.blocks import Block, Hidden, reconstruction_loss
from besa_exp.importance import wanda_importance
from besa_exp.masks import Target
from besa_exp.pruners.allocation import Rows, project_to_budget
from besa_exp.pruning import PrunedBlock, finite_step, num_probe_samples, probe_loss
from besa_exp.reports import Step
from besa_exp.statistics import InputNorm


@dataclass(frozen=True)
class Besa:
    """`granularity` row or linear: whom a sparsity is shared by. `lr` is the first step size, in sparsity: it only
    shrinks. `window`: ranks around the cut that the gradient averages, as a fraction of the row. `checks`: how often
    the probe samples judge."""

    granularity: str = "row"
    epochs: int = 1
    batch_size: int = 1
    lr: float = 0.05
    window: float = 0.1
    checks: int = 2
    seed: int = 0

    statistic = InputNorm
    dense_targets = False

    def __post_init__(self) -> None:
        if self.granularity not in ("row", "linear"):
            raise ValueError(f"pruner.granularity={self.granularity}: must be row or linear")
        for field in ("epochs", "batch_size", "checks"):
            if getattr(self, field) < 1:
                raise ValueError(f"pruner.{field}={getattr(self, field)}: must be at least 1")
        for field in ("lr", "window"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(f"pruner.{field}={getattr(self, field)}: must be above 0 and at most 1")

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """N:M leaves nothing to allocate."""
        if pattern == "unstructured":
            return []
        return [
            f"pattern={pattern}: besa allocates sparsity between rows, and N:M fixes it in every row; use "
            "pattern=unstructured, or pruner=wanda, sparsegpt or magnitude for N:M"
        ]

    def prune_block(
        self,
        block: Block,
        inputs: Hidden,
        targets: Hidden,
        statistics: Mapping[str, InputNorm],
        target: Target,
        on_step: Callable[[Step], None],
    ) -> PrunedBlock:
        """Learn the sparsities of the block's cells, then fix the masks."""
        weights = {name: linear.weight.detach() for name, linear in block.linears.items()}
        rows = Rows.of(
            weights, lambda name: wanda_importance(weights[name], statistics[name].squared_norm), self.granularity
        )
        total = round(target.sparsity * rows.num_weights)
        buffers = {name: torch.empty_like(weight).requires_grad_() for name, weight in weights.items()}
        search = _Search(block, rows, total, rows.per_cell(rows.columns, rows.num_cells), buffers)
        best, before, steps = self._learn(search, inputs, targets, on_step)
        counts = rows.counts(best, total)
        return PrunedBlock(
            keep_masks=rows.keep_masks(counts),
            allocated={name: count / weights[name].shape[1] for name, count in counts.items()},
            loss_before=before,
            steps=tuple(steps),
        )

    def _learn(
        self, search: _Search, inputs: Hidden, targets: Hidden, on_step: Callable[[Step], None]
    ) -> tuple[Tensor, float, list[Step]]:
        """The sparsities [cell] with the lowest probe loss that were seen, the loss at the start, and the course."""
        num_samples = distributed.total(len(inputs))
        learn = max(1, num_samples - num_probe_samples(num_samples))
        num_steps = self.epochs * math.ceil(learn / self.batch_size)
        every = math.ceil(num_steps / self.checks)
        sparsity, scale = torch.full_like(search.capacity, search.expected), self.lr
        best, start_loss = sparsity.clone(), search.probe_loss(inputs, targets, sparsity)
        best_loss = start_loss
        optimizer = torch.optim.Adam([sparsity], betas=(0.8, 0.99), eps=1e-30)
        order = torch.Generator().manual_seed(self.seed)
        steps: list[Step] = []
        while len(steps) < num_steps:
            for samples in torch.randperm(learn, generator=order).to(inputs.device).split(self.batch_size):
                own = distributed.own_places(samples)
                step, sparsity.grad = search.gradient(inputs[own], targets[own], sparsity, self.window, len(steps))
                steps.append(step)
                on_step(step)
                for group in optimizer.param_groups:
                    group["lr"] = scale * (1 + math.cos(math.pi * (len(steps) - 1) / num_steps)) / 2
                optimizer.step()
                sparsity.copy_(project_to_budget(sparsity, search.capacity, search.total))
                if len(steps) % every and len(steps) < num_steps:
                    continue
                loss = search.probe_loss(inputs, targets, sparsity)
                if loss < best_loss:
                    best, best_loss = sparsity.clone(), loss
                else:
                    sparsity.copy_(best)
                    scale *= 0.4
                    optimizer.state[sparsity]["exp_avg"].zero_()
        return best, start_loss, steps


@dataclass(frozen=True)
class _Search:
    """What the search asks of one block: losses and gradients of an allocation that prunes `total` weights.

    `capacity`: weights of each cell. `masked` are buffers for the pruned weights: leaves that every step fills anew."""

    block: Block
    rows: Rows
    total: int
    capacity: Tensor
    masked: Mapping[str, Tensor]

    @property
    def expected(self) -> float:
        """The sparsity of the block."""
        return self.total / self.rows.num_weights

    def gradient(
        self, inputs: Hidden, targets: Hidden, sparsity: Tensor, window: float, step: int
    ) -> tuple[Step, Tensor]:
        """The step's record, and dL / d(sparsity of a cell) along the budget: without the part that would only change
        the total. `inputs` are this rank's of the batch; it may have none."""
        counts = self._mask(sparsity)
        loss = reconstruction_loss(self.block(inputs, self.masked), targets)
        by_row = torch.zeros_like(self.rows.columns)
        if len(inputs):
            gradients = dict(zip(self.masked, torch.autograd.grad(loss, list(self.masked.values())), strict=True))
            by_row = self.rows.row_gradient(gradients, counts, window)
        by_row = distributed.all_sum(by_row)
        by_cell = self.rows.per_cell(by_row, len(self.capacity))
        along_budget = by_cell - self.capacity * (by_cell.sum() / self.rows.num_weights)
        return finite_step(self.block, step, loss, loss, 0.0, self.expected), along_budget

    def probe_loss(self, inputs: Hidden, targets: Hidden, sparsity: Tensor) -> float:
        """The loss of the samples that are not learned from."""
        self._mask(sparsity)
        return probe_loss(self.block, inputs, targets, self.masked)

    @torch.no_grad()
    def _mask(self, sparsity: Tensor) -> dict[str, Tensor]:
        counts = self.rows.counts(sparsity, self.total)
        self.rows.masked_into(self.masked, counts)
        return counts
