"""BESA (Xu et al., arXiv 2402.16880) without the limits of its published code: the default pruner.

Within each block the sparsity s of every row is learned by gradient descent on the block's reconstruction loss, through
hard masks, at a total that is met exactly:

    k     = n s, rounded so that sum(k) = total          n: the row's weights
    W_hat = W where rank >= k, else 0                    (Eq. 3; rank: by importance, 0 = least)
    L     = mean_t ||Y_t - f(X; W_hat)_t||^2 / ||Y_t||^2 (Eq. 1, relative to each token's size)
    dL/ds = n dL/dk = - n mean of W dL/dW_hat over the ranks around k
    s     <- project(s - Adam(dL/ds))                    onto sum(n s) = total

`besa_step` computes the first four lines, `descend` repeats them. The method is in this file, in
`besa_exp.methods.allocation` (counts, projection), `besa_exp.methods.cuts` (masks and their gradient) and
`besa_exp.methods.descent`.
What differs from the authors' code (`besa_paper`), and why:

- The parameter is the row's sparsity itself, not logits over D + 1 candidates (Eq. 4): any sparsity in [0, 1] can be
  reached, where softmax(sigmoid(.)) stays in [0.376, 0.624], and every row starts at the goal, not at 0.5.
- The block's budget is a constraint, not a penalty (Eq. 5): there is no lambda, and the goal is met at every step.
- The gradient looks at the ranks around the cut, the weights that could go or stay next; the candidates' soft mask
  spreads over the whole row.
- Some calibration samples (the probe) are not learned from. They judge halfway and at the end: a state that does not
  lower their loss is dropped for the best so far, and the step size shrinks. So a block is never worse on them than
  where it began: at the uniform allocation, which is Wanda at the exact budget. Their passes cost what the steps on
  them would have.

The same functions serve what is built on them: learned clipping (`besa_joint`), parts of a block (`sub_blocks`), rows
that keep an N of every M inputs (`besa_exp.methods.n_of_m`), the whole model (`model_search`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden, samples_at
from besa_exp.blocks.course import Course
from besa_exp.blocks.probe import num_learned, probe_loss
from besa_exp.blocks.pruner import PrunedBlock, Task, Traits
from besa_exp.blocks.reports import Step
from besa_exp.blocks.units import SCOPES
from besa_exp.blocks.whole_model import batches
from besa_exp.machine import distributed
from besa_exp.methods.allocation import Rows, along_budget, project_to_budget
from besa_exp.methods.cuts import Buffers, cut_block
from besa_exp.methods.descent import descend
from besa_exp.methods.n_of_m import rows_of_groups
from besa_exp.methods.pruners.model_search import ModelSearch
from besa_exp.methods.pruners.sub_blocks import prune_parts
from besa_exp.rules import Count, Seed, Share, check_fields, one_of
from besa_exp.tensors.importance import Importance, ImportanceName, importance_of
from besa_exp.tensors.losses import LOSSES, Loss, differentiate, gradients, token_loss
from besa_exp.tensors.pattern import fixes_sparsity


def besa_step(
    block: Block,
    inputs: Hidden,
    targets: Hidden,
    rows: Rows,
    sparsity: Float[Tensor, " cell"],
    total: int,
    window: float,
    room: Buffers,
    loss_of: Loss = token_loss,
    also: Sequence[Tensor] = (),
) -> tuple[Float[Tensor, ""], list[Tensor]]:
    """The loss L of a batch and dL/ds along the budget, followed by dL/d(each of `also`), which the weights of `rows`
    depend on. Inputs and targets are those of this rank's samples, of which there may be none; the loss and the
    gradients are those of all ranks' samples. `window`: a fraction of the row. `room` is written into."""
    # Whole numbers k of weights to prune in each row: next to n s, sum(k) = total exactly
    counts = rows.counts(sparsity, total)
    # Hard masks, W_hat = W where rank >= k (Eq. 3), and the block's outputs with them
    outputs, cuts = cut_block(block, inputs, rows, counts, window, room)
    # Reconstruction loss L (Eq. 1) and a multiple of dL/d(outputs) that no dtype rounds to zero
    loss, upstream, multiple = differentiate(lambda Y_hat: loss_of(Y_hat, targets), outputs, block.product_dtype)
    # dL/dk straight through the mask: - mean of W dL/dW_hat over the window around the cut
    found = gradients(outputs, [*cuts, *also], upstream)
    # dL/ds = n dL/dk of each row, summed over the samples of all ranks and the rows of a cell
    by_row = rows.levels * torch.cat(found[: len(cuts)]).double()
    by_cell = rows.per_cell(distributed.all_sum(by_row / multiple))
    # Along the budget: without the part that would change sum(n s)
    by_sparsity = along_budget(by_cell, rows.capacity)
    return loss, [by_sparsity, *(distributed.all_sum(own / multiple) for own in found[len(cuts) :])]


@dataclass(frozen=True)
class Besa:
    """`importance`: what ranks the weights of a row. `granularity` row or linear: whom a sparsity is shared by. `lr` is
    the first step size, in sparsity: it only shrinks. `window`: ranks around the cut that the gradient averages, as a
    fraction of the row. `checks`: how often the probe samples judge. `scope`: what shares a loss and a budget
    (`besa_exp.blocks.units`). `loss`: what is learned from (`besa_exp.tensors.losses`). `model`: with scope=model, the
    search over the whole model."""

    granularity: Annotated[str, one_of("row", "linear")] = "row"
    epochs: Count = 1
    batch_size: Count = 1
    lr: Share = 0.05
    window: Share = 0.1
    checks: Count = 2
    seed: Seed = 0
    scope: Annotated[str, one_of(*SCOPES)] = "block"
    loss: Annotated[str, one_of(*LOSSES)] = "token"
    importance: Importance | ImportanceName = "wanda"
    model: ModelSearch = field(default_factory=ModelSearch)

    def __post_init__(self) -> None:
        importance_of(self.importance)  # which refuses an unknown name
        check_fields(self, "pruner")

    @property
    def traits(self) -> Traits:
        """What the importance observes, and what the scope asks of the block loop."""
        importance = importance_of(self.importance)
        return Traits(
            importance.statistic,
            importance.gradients,
            blocks_together=2 if self.scope == "pair" else 1,
            refinements=(replace(self.model, importance=self.importance),) if self.scope == "model" else (),
        )

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """What N is in every row is to be allocated, not given."""
        problems = []
        if self.scope == "model" and (pattern != "unstructured" or self.granularity != "row"):
            problems.append(
                "pruner.scope=model: allocates sparsity between single rows under pattern=unstructured; use "
                "pruner.scope=block, or pruner=besa with pattern=unstructured"
            )
        if not fixes_sparsity(pattern):
            return problems
        group = pattern.partition(":")[2]
        return [
            *problems,
            f"pattern={pattern}: besa allocates sparsity between rows, and this pattern fixes it in every row; use "
            f"pattern=N:{group}, in which every row keeps its own N, or pruner=wanda, sparsegpt or magnitude",
        ]

    def prune_block(self, task: Task) -> PrunedBlock:
        """Learn the sparsities of the block's rows, then fix the masks."""
        if self.scope == "sub_block":
            return prune_parts(task, self.start, replace(self, scope="block").prune_block, self.batch_size)
        rows = self.rows(task, lambda name: task.score(importance_of(self.importance), name))
        sparsity, loss_before, steps = self.learn(task, rows, lambda: rows)
        counts = rows.counts(sparsity, total_of(task, rows))
        return PrunedBlock(rows.keep_masks(counts), rows.sparsity(counts), loss_before=loss_before, steps=steps)

    def start(self, task: Task) -> dict[str, Tensor]:
        """The weights where the search begins: the same sparsity in every row."""
        rows = self.rows(task, lambda name: task.score(importance_of(self.importance), name))
        return Buffers.like(rows.weights).fill(rows, rows.counts(*uniform(task, rows)))

    def rows(self, task: Task, score: Callable[[str], Tensor]) -> Rows:
        group = task.goal.group
        make = Rows.of if group is None else partial(rows_of_groups, group=group)
        return make(task.weights, score, self.granularity)

    def learn(
        self,
        task: Task,
        rows: Rows,
        effective: Callable[[], Rows],
        also: Sequence[tuple[Tensor, float]] = (),
    ) -> tuple[Float[Tensor, " cell"], float, tuple[Step, ...]]:
        """The sparsities with the lowest probe loss that was seen, the reconstruction loss where the search began, and
        its course. `effective` gives the rows with the weights that are masked, which may depend on `also`: tensors
        learned along with the sparsities, each with its first step size. They are left at their best."""
        block, inputs, targets, loss_of = task.block, task.inputs, task.targets, LOSSES[self.loss]
        sparsity, total = uniform(task, rows)
        room = Buffers.like(rows.weights)
        course = Course(block, task.on_step)
        learn = num_learned(distributed.total(len(inputs)))

        def gradient(samples: Tensor, number: int, best_loss: float) -> list[Tensor]:
            own = distributed.own_places(samples)
            X, Y = samples_at(inputs, own), samples_at(targets, own)
            leaves = [tensor for tensor, _ in also]
            loss, found = besa_step(block, X, Y, effective(), sparsity, total, self.window, room, loss_of, leaves)
            course.add(loss, total / rows.num_weights, found[0])
            return found

        def project() -> None:
            sparsity.copy_(project_to_budget(sparsity, rows.capacity, total))

        @torch.no_grad()
        def probed(loss: Loss) -> float:
            course.wait()
            now = effective()
            return probe_loss(block, inputs, targets, room.fill(now, now.counts(sparsity, total)), loss)

        num_steps = self.epochs * math.ceil(learn / self.batch_size)
        order = batches(learn, self.batch_size, self.seed)
        before = probed(token_loss) if loss_of is not token_loss else None  # what is reported
        judge = partial(probed, loss_of)
        started = descend([(sparsity, self.lr), *also], order, num_steps, self.checks, gradient, project, judge)
        return sparsity, started if before is None else before, tuple(course.steps)


def total_of(task: Task, rows: Rows) -> int:
    return round(task.goal.sparsity * rows.num_weights)


def uniform(task: Task, rows: Rows) -> tuple[Float[Tensor, " cell"], int]:
    """The same sparsity in every cell, and the total that it comes to."""
    total = total_of(task, rows)
    return torch.full_like(rows.capacity, total / rows.num_weights), total
