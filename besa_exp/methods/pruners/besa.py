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
- With pattern=N:M every row (or linear) learns how many of every M consecutive inputs it keeps, by the same means: the
  ranks are then within groups of M, and a row gives up whole levels of them (`allocation`).

Joint compression (the paper's Section 3.4): with a quantiser the kept weights are rounded in every pass, and the
clipping of each row or group is learned by the same loss and steps as the sparsities. Importance is then what a rounded
weight spares (`rounded_importance`). Weights that round to zero go first; where a row keeps some all the same, they are
zeros beyond the budget, and reported as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.probe import num_probe_samples, probe_loss
from besa_exp.blocks.pruner import PrunedBlock, joined
from besa_exp.blocks.reports import Step
from besa_exp.blocks.units import SCOPES, sub_blocks
from besa_exp.machine import distributed
from besa_exp.methods.allocation import Rows, project_to_budget
from besa_exp.methods.pruners.model_search import ModelSearch
from besa_exp.methods.pruners.search import Search, State
from besa_exp.tensors.importance import rounded_importance, wanda_importance
from besa_exp.tensors.losses import LOSSES
from besa_exp.tensors.masks import Target
from besa_exp.tensors.pattern import fixes_sparsity
from besa_exp.tensors.quantisation import Quantiser, quantise
from besa_exp.tensors.statistics import InputNorm, WithNorm

CLIPPING_START = 0.99  # strength of all clipping at first: 1, where the sigmoid never gets, would clip nothing
CLIPPING_LR = 0.1  # first step size of the strengths' logits


@dataclass(frozen=True)
class Besa:
    """`granularity` row or linear: whom a sparsity is shared by. `lr` is the first step size, in sparsity: it only
    shrinks. `window`: ranks around the cut that the gradient averages, as a fraction of the row. `checks`: how often
    the probe samples judge. `scope`: what shares a loss and a budget (`besa_exp.blocks.units`). `loss`: what is learned
    from (`besa_exp.tensors.losses`). `model`: with scope=model, the search over the whole model. `quantiser`: what the
    kept weights are rounded with; None: they stay as they are."""

    granularity: str = "row"
    epochs: int = 1
    batch_size: int = 1
    lr: float = 0.05
    window: float = 0.1
    checks: int = 2
    seed: int = 0
    scope: str = "block"
    loss: str = "token"
    quantiser: Quantiser | None = None
    model: ModelSearch = field(default_factory=ModelSearch)

    statistic = InputNorm
    dense_targets = False

    def __post_init__(self) -> None:
        for key, choices in (("granularity", ("row", "linear")), ("scope", SCOPES), ("loss", LOSSES)):
            if getattr(self, key) not in choices:
                raise ValueError(f"pruner.{key}={getattr(self, key)}: must be {' or '.join(choices)}")
        for key in ("epochs", "batch_size", "checks"):
            if getattr(self, key) < 1:
                raise ValueError(f"pruner.{key}={getattr(self, key)}: must be at least 1")
        for key in ("lr", "window"):
            if not 0 < getattr(self, key) <= 1:
                raise ValueError(f"pruner.{key}={getattr(self, key)}: must be above 0 and at most 1")

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """What N is in every row is to be allocated, not given."""
        problems = []
        if self.scope == "model" and (pattern != "unstructured" or self.granularity != "row" or self.quantiser):
            problems.append(
                "pruner.scope=model: allocates sparsity between single rows under pattern=unstructured, and rounds no "
                "weights; use pruner.scope=block, or pruner=besa with pattern=unstructured"
            )
        if not fixes_sparsity(pattern):
            return problems
        group = pattern.partition(":")[2]
        return [
            *problems,
            f"pattern={pattern}: besa allocates sparsity between rows, and this pattern fixes it in every row; use "
            f"pattern=N:{group}, in which every row keeps its own N, or pruner=wanda, sparsegpt or magnitude",
        ]

    def refinements(self, pattern: str) -> tuple[ModelSearch, ...]:
        """What follows the block loop."""
        return (self.model,) if self.scope == "model" else ()

    def prune_block(
        self,
        block: Block,
        inputs: Hidden,
        targets: Hidden,
        statistics: Mapping[str, WithNorm],
        target: Target,
        on_step: Callable[[Step], None],
    ) -> PrunedBlock:
        """Learn the sparsities of the block's cells and the clipping, then fix the masks. Sub-blocks come one after the
        other, each towards what it would make, dense, of what those before it have become."""
        parts = sub_blocks(block, inputs) if self.scope == "sub_block" else [(block, tuple(block.linears))]
        searches = self._searches(parts, statistics, target)
        pruned, fixed = [], {}
        loss_before = _start_loss(block, searches, inputs, targets) if len(searches) > 1 else None
        own_targets = torch.empty_like(targets) if len(searches) > 1 else None
        for begun in searches:
            search = replace(begun, fixed=fixed)
            if len(searches) > 1:
                targets = search.block.outputs(inputs, self.batch_size, fixed, out=own_targets)
            done = sum(len(part.steps) for part in pruned)
            state, own_loss, steps = self._learn(search, inputs, targets, on_step, done)
            pruned.append(search.pruned(state, own_loss if loss_before is None else loss_before, steps))
            fixed = fixed | search.weights(state)
        return joined(pruned)

    def _searches(
        self, parts: Sequence[tuple[Block, Sequence[str]]], statistics: Mapping[str, WithNorm], target: Target
    ) -> list[Search]:
        """One for each part and the linears that are its own, with budgets that add up exactly."""
        searches, done = [], 0
        for part, names in parts:
            weights = {name: part.linears[name].weight.detach() for name in names}
            importance = partial(self._importance, weights, statistics)
            rows = Rows.of(weights, importance, self.granularity, target.group)
            total = round(target.sparsity * (done + rows.num_weights)) - round(target.sparsity * done)
            searches.append(Search.of(part, rows, total, self.quantiser, LOSSES[self.loss]))
            done += rows.num_weights
        return searches

    def _importance(self, weights: Mapping[str, Tensor], statistics: Mapping[str, WithNorm], name: str) -> Tensor:
        weight, squared_norm = weights[name], statistics[name].squared_norm
        if self.quantiser is None:
            return wanda_importance(weight, squared_norm)
        return rounded_importance(weight, quantise(weight, self.quantiser), squared_norm)

    def _learn(
        self, search: Search, inputs: Hidden, targets: Hidden, on_step: Callable[[Step], None], done: int
    ) -> tuple[State, float, list[Step]]:
        """The state with the lowest probe loss that was seen, the loss at the start, and the course, its steps counted
        on from `done`."""
        num_samples = distributed.total(len(inputs))
        learn = max(1, num_samples - num_probe_samples(num_samples))
        num_steps = self.epochs * math.ceil(learn / self.batch_size)
        every = math.ceil(num_steps / self.checks)
        state = search.start(CLIPPING_START)
        best, start_loss = state.clone(), search.probe_loss(inputs, targets, state)
        best_loss = start_loss
        optimizer = _optimizer(state, self.lr)
        order = torch.Generator().manual_seed(self.seed)
        steps: list[Step] = []
        while len(steps) < num_steps:
            for samples in torch.randperm(learn, generator=order).to(inputs.device).split(self.batch_size):
                own = distributed.own_places(samples)
                step, gradients = search.gradient(inputs[own], targets[own], state, self.window, done + len(steps))
                steps.append(step)
                on_step(step)
                _step(optimizer, state, gradients, (1 + math.cos(math.pi * (len(steps) - 1) / num_steps)) / 2)
                state.sparsity.copy_(project_to_budget(state.sparsity, search.capacity, search.total))
                if len(steps) % every and len(steps) < num_steps:
                    continue
                loss = search.probe_loss(inputs, targets, state)
                if loss < best_loss:
                    best, best_loss = state.clone(), loss
                else:
                    state.copy_(best)
                    _slow_down(optimizer)
        return best, start_loss, steps


def _start_loss(block: Block, searches: Sequence[Search], inputs: Hidden, targets: Hidden) -> float:
    """The block's own loss with all its parts as they start."""
    start = {name: W for search in searches for name, W in search.weights(search.start(CLIPPING_START)).items()}
    return probe_loss(block, inputs, targets, start)


def _optimizer(state: State, lr: float) -> torch.optim.Adam:
    """`scale` is a group's step size at the start of the schedule."""
    groups = [{"params": [state.sparsity], "scale": lr}]
    if state.clipping:
        groups.append({"params": list(state.clipping.values()), "scale": CLIPPING_LR})
    return torch.optim.Adam(groups, betas=(0.8, 0.99), eps=1e-30)


def _step(optimizer: torch.optim.Adam, state: State, gradients: list[Tensor], schedule: float) -> None:
    for tensor, gradient in zip(state.tensors(), gradients, strict=True):
        tensor.grad = gradient
    for group in optimizer.param_groups:
        group["lr"] = group["scale"] * schedule
    optimizer.step()


def _slow_down(optimizer: torch.optim.Adam) -> None:
    """Smaller steps from a standstill."""
    for group in optimizer.param_groups:
        group["scale"] *= 0.4
        for tensor in group["params"]:
            optimizer.state[tensor]["exp_avg"].zero_()
