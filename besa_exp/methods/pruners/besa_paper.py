"""BESA as its authors' code computes it (Xu et al., arXiv 2402.16880; OpenGVLab/LLMPrune-BESA), every switch included.

For each row (or linear) logits theta over D + 1 candidate sparsities p_d; beta = softmax(sigmoid(theta)); the row's
sparsity is alpha = sum_d beta_d p_d (Eq. 4). Hard mask: the floor(alpha * in) least important weights of the row go.
Its gradient is that of the soft mask, in which the weight at rank r is pruned with probability
sum of beta_d over candidates with floor(in * p_d) > r (Eq. 3). Per step (Eq. 5)

    loss = sum(((Y - Yhat) / ||Y||_channel)^2) / hidden + penalty * ((s - target) / target)^2.

This file keeps the limits of that code, because the published numbers came from it: softmax(sigmoid(.)) over 101
candidates reaches only row sparsities in [0.376, 0.624], every row starts at 0.5, the floor loses up to one weight a
row, and the float candidates drift (arange from 1.0 down). `besa.py` is the method without them. The masks here are
functions of the weight's rank: no sort indices, no scatter of hard and soft masks; the gradient to beta is a prefix sum
over ranks. The result is the same up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from prodigyopt import Prodigy
from torch import Tensor, nn

from besa_exp.blocks.course import Course
from besa_exp.blocks.probe import probe_loss
from besa_exp.blocks.pruner import PrunedBlock, Task, Traits, pruned_by_masks
from besa_exp.machine import distributed
from besa_exp.methods.pruners.candidates import CandidateAllocation, reach
from besa_exp.rules import Count, NotNegative, Positive, check_fields, one_of, within
from besa_exp.tensors.hessian import dead_inputs, upper_factor
from besa_exp.tensors.importance import Importance, Magnitude, Wanda, obs_importance
from besa_exp.tensors.losses import channel_loss, differentiate
from besa_exp.tensors.statistics import Hessian, by_shared_input

IMPORTANCES: dict[str, Importance] = {"Wanda": Wanda(), "Weight": Magnitude()}  # by the authors' names


@dataclass(frozen=True)
class BesaPaper:
    """The authors' algorithm, their flags in brackets where the names differ.

    `granularity`: row or linear. `metric`: Wanda, Weight, SparseGPT or SparseGPT-Git [metric-type]. `sigmoid` smooths
    the logits. `dense_targets` [prune-dense]. `sparsity_step` = 1/D. `penalty`: lambda of Eq. 5 [sparsity-beta].
    `optimizer`: prodigy or adamw [normal-opt]. `lr`: 1 for prodigy, 0.01 for adamw. `d_coef`: per model in the
    published runs, 5 for row-wise 7B and 13B."""

    granularity: Annotated[str, one_of("row", "linear")] = "row"
    metric: Annotated[str, one_of(*IMPORTANCES, "SparseGPT", "SparseGPT-Git")] = "Wanda"
    sigmoid: bool = True
    dense_targets: bool = False
    sparsity_step: Annotated[float, within(least=0.0001, most=0.5)] = 0.01
    penalty: NotNegative = 5.0
    epochs: Count = 1
    batch_size: Count = 1
    optimizer: Annotated[str, one_of("prodigy", "adamw")] = "prodigy"
    lr: Positive = 1.0
    d_coef: Annotated[float, within(above=0, most=1e6)] = 5.0
    damping: Positive = 0.01

    def __post_init__(self) -> None:
        check_fields(self, "pruner")

    @property
    def traits(self) -> Traits:
        """What the metric observes, the targets, and the least and the largest sparsity of a row."""
        statistic = IMPORTANCES[self.metric].statistic if self.metric in IMPORTANCES else Hessian
        return Traits(statistic, dense_targets=self.dense_targets, reach=reach(self.sparsity_step, self.sigmoid))

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """The penalty divides by the target; N:M leaves nothing to allocate."""
        problems = []
        if pattern != "unstructured":
            problems.append(
                f"pattern={pattern}: besa_paper allocates sparsity between rows, and N:M fixes it in every row; use "
                "pattern=unstructured, pruner=besa with pattern=N:8 where every row chooses its N, or pruner=wanda, "
                "sparsegpt or magnitude."
            )
        if not sparsity > 0:
            problems.append(f"sparsity={sparsity:g}: besa_paper needs a target above 0 (its penalty divides by it).")
        return problems

    def prune_block(self, task: Task) -> PrunedBlock:
        """Learn theta for `epochs` passes over the samples in order, then fix the hard masks. A block of which a budget
        asks nothing stays dense: the penalty is relative to the target."""
        block, goal, inputs, targets = task.block, task.goal, task.inputs, task.targets
        if goal.sparsity == 0:
            return pruned_by_masks({name: torch.ones_like(W, dtype=torch.bool) for name, W in task.weights.items()})
        weights, importances = self._importances(task)
        kind = (self.granularity == "row", self.sigmoid, self.sparsity_step)
        allocations = {name: CandidateAllocation(weights[name], own, *kind) for name, own in importances.items()}
        start = {name: weights[name] * allocation.keep_mask() for name, allocation in allocations.items()}
        before = probe_loss(block, inputs, targets, start)
        thetas = [allocation.theta for allocation in allocations.values()]
        total = sum(weight.numel() for weight in weights.values())
        optimizer = self._optimizer(thetas)
        course = Course(block, task.on_step)
        for own in distributed.own_batches(len(inputs), self.batch_size) * self.epochs:
            # Hard masks, whose gradient is that of the soft ones (Eq. 3), and the block's sparsity s from alpha (Eq. 4)
            masked, sparsity = {}, torch.zeros((), device=inputs.device)
            for name, allocation in allocations.items():
                masked[name], linear_sparsity = allocation()
                sparsity = sparsity + linear_sparsity * (weights[name].numel() / total)
            # Reconstruction loss (Eq. 1) and penalty (Eq. 5)
            outputs = block(inputs[own], masked)
            loss_of = partial(channel_loss, targets=targets[own])
            reconstruction, upstream, scale = differentiate(loss_of, outputs, block.product_dtype)
            penalty = self.penalty * ((sparsity - goal.sparsity) / goal.sparsity) ** 2
            # Gradient to theta; each of several ranks adds its samples' part and an equal part of the penalty's
            own_penalty = scale * penalty / distributed.num_ranks()
            roots, parts = ([outputs, own_penalty], [upstream, None]) if len(outputs) else ([own_penalty], [None])
            gradients = [distributed.all_sum(own / scale) for own in torch.autograd.grad(roots, thetas, parts)]
            for theta, gradient in zip(thetas, gradients, strict=True):
                theta.grad = gradient
            by_all = torch.stack([gradient.abs().max() for gradient in gradients])  # a linear's own may well be zero
            course.add(reconstruction + penalty, sparsity, by_all, reconstruction, penalty)
            optimizer.step()
        course.wait()
        return PrunedBlock(
            keep_masks={name: allocation.keep_mask() for name, allocation in allocations.items()},
            allocated={name: allocation.row_sparsity().detach() for name, allocation in allocations.items()},
            weights=weights if self.traits.statistic is Hessian else None,  # those of dead inputs are zero
            loss_before=before,
            steps=tuple(course.steps),
        )

    def _optimizer(self, thetas: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(thetas, lr=self.lr, weight_decay=0)
        return Prodigy(thetas, lr=self.lr, weight_decay=0, d_coef=self.d_coef)

    def _importances(self, task: Task) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights, zero where an input is dead, and their importances."""
        weights = task.weights
        if self.metric in IMPORTANCES:
            return weights, {name: task.score(IMPORTANCES[self.metric], name) for name in weights}
        importances = {}
        for hessian, names in by_shared_input(task.statistics):
            H = hessian.matrix
            factor = upper_factor(H, self.damping, f"{task.block.name}.{names[0]}")
            for name in names:
                weights[name] = weights[name].masked_fill(dead_inputs(H), 0)
                importances[name] = obs_importance(weights[name], factor, self.metric == "SparseGPT-Git")
        return weights, importances
