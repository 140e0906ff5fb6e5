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
- The step size finds itself: some calibration samples (the probe) are not learned from. Every few steps they judge; a
  state that does not lower their loss is dropped for the best so far, and the step size shrinks. So a block is never
  worse on them than where it began: at the uniform allocation, which is Wanda at the exact budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from besa_exp.blocks import Block, Hidden, reconstruction_loss
from besa_exp.importance import wanda_importance
from besa_exp.masks import Target
from besa_exp.pruners.allocation import Rows, project_to_budget
from besa_exp.pruning import PrunedBlock, finite_step, num_probe_samples
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
    checks: int = 8
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
        importances = {name: wanda_importance(weights[name], statistics[name].squared_norm) for name in weights}
        rows = Rows.of(weights, importances, self.granularity)
        total = round(target.sparsity * rows.num_weights)
        start = torch.full_like(rows.capacity, total / rows.num_weights)
        search = _Search(block, rows, total, num_probe_samples(len(inputs)))
        best, steps = self._learn(search, inputs, targets, start, on_step)
        counts = rows.counts(best, total)
        return PrunedBlock(
            keep_masks=rows.keep_masks(counts),
            allocated={name: count / weights[name].shape[1] for name, count in counts.items()},
            start_masks=rows.keep_masks(rows.counts(start, total)),
            steps=tuple(steps),
        )

    def _learn(
        self, search: _Search, inputs: Hidden, targets: Hidden, start: Tensor, on_step: Callable[[Step], None]
    ) -> tuple[Tensor, list[Step]]:
        """The sparsities [cell] with the lowest probe loss that were seen, and the course."""
        learn = max(1, len(inputs) - search.num_probe)
        num_steps = self.epochs * math.ceil(learn / self.batch_size)
        every = math.ceil(num_steps / self.checks)
        sparsity, scale = start.clone(), self.lr
        best, best_loss = start, search.probe_loss(inputs, targets, start)
        optimizer = torch.optim.Adam([sparsity], betas=(0.8, 0.99), eps=1e-30)
        order = torch.Generator().manual_seed(self.seed)
        steps: list[Step] = []
        while len(steps) < num_steps:
            for samples in torch.randperm(learn, generator=order).split(self.batch_size):
                step, sparsity.grad = search.gradient(
                    inputs[samples], targets[samples], sparsity, self.window, len(steps)
                )
                steps.append(step)
                on_step(step)
                for group in optimizer.param_groups:
                    group["lr"] = scale * (1 + math.cos(math.pi * (len(steps) - 1) / num_steps)) / 2
                optimizer.step()
                sparsity.copy_(project_to_budget(sparsity, search.rows.capacity, search.total))
                if len(steps) % every and len(steps) < num_steps:
                    continue
                loss = search.probe_loss(inputs, targets, sparsity)
                if loss < best_loss:
                    best, best_loss = sparsity.clone(), loss
                else:
                    sparsity.copy_(best)
                    scale *= 0.4
                    optimizer.state[sparsity]["exp_avg"].zero_()
        return best, steps


@dataclass(frozen=True)
class _Search:
    """What the search asks of one block: losses and gradients of an allocation that prunes `total` weights."""

    block: Block
    rows: Rows
    total: int
    num_probe: int

    def gradient(
        self, inputs: Hidden, targets: Hidden, sparsity: Tensor, window: float, step: int
    ) -> tuple[Step, Tensor]:
        counts = self.rows.counts(sparsity, self.total)
        masked = {name: weight.requires_grad_() for name, weight in self.rows.masked(counts).items()}
        loss = reconstruction_loss(self.block(inputs, masked), targets)
        gradients = dict(zip(masked, torch.autograd.grad(loss, list(masked.values())), strict=True))
        expected = self.total / self.rows.num_weights
        return (
            finite_step(self.block, step, loss, loss, 0.0, expected),
            self.rows.sparsity_gradient(gradients, counts, window),
        )

    def probe_loss(self, inputs: Hidden, targets: Hidden, sparsity: Tensor) -> float:
        weights = self.rows.masked(self.rows.counts(sparsity, self.total))
        outputs = self.block.outputs(inputs[-self.num_probe :], self.num_probe, weights)
        return float(reconstruction_loss(outputs, targets[-self.num_probe :]))
