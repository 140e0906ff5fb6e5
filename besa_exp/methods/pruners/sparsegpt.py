"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune column by column, kept weights make up for the pruned.

With H = 2/n X^T X and U the upper Cholesky factor of its damped inverse, removing weight (i, j) with the best update of
the row's later weights adds w^2 / U_jj^2 to the squared error; the update is w_i,k -= (w_ij / U_jj) U_jk for k > j.
Columns go in groups: the mask of a group is chosen when the group is reached, lowest w^2 / U_jj^2 first over all rows.

The authors' threshold takes one weight too many per group (`<=` against the sorted value at the count); here the count
is exact. With a mask given, the result does not depend on the group size.

U itself is never formed. Let R = U^-1, which is upper triangular too, with R R^T = H, and let E = W - W_hat be the
change made to earlier columns. On reaching group g its current weights are

    W_g + E R_before,g (R_g,g)^-1

(QuIP, Chee et al., arXiv 2307.13304, proves this form equal). So H is factored once and not inverted, and each group
is written once, where updating all later columns after every group writes them over and over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from besa_exp.blocks.probe import probe_loss
from besa_exp.blocks.pruner import PrunedBlock, Task, Traits, pruned_by_masks
from besa_exp.rules import Count, Positive, check_fields
from besa_exp.tensors import kernels
from besa_exp.tensors.hessian import dead_inputs, upper_factor
from besa_exp.tensors.importance import obs_importance
from besa_exp.tensors.masks import Goal, goals_of_linears, keep_largest, keep_n_of_m
from besa_exp.tensors.pattern import check_unchosen
from besa_exp.tensors.statistics import Hessian, by_shared_input


def sparsegpt(
    weight: Float[Tensor, "out in"],
    factor: Float[Tensor, "in in"],
    goal: Goal,
    group_size: int = 128,
    keep_mask: Bool[Tensor, "out in"] | None = None,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """The pruned and updated weight in fp32, and its keep mask (Algorithm 1). `factor` is R of `upper_factor`.

    `keep_mask` fixes the mask; else it is chosen group by group, or for N:M every M columns."""
    weight = weight.float()
    kept = torch.ones_like(weight, dtype=torch.bool) if keep_mask is None else keep_mask
    change = torch.empty_like(weight)  # W - W_hat
    for start in range(0, weight.shape[1], group_size):
        group = slice(start, start + group_size)
        # R_gg and its inverse, which is U of the group
        R_gg = factor[group, group]
        U_gg = torch.linalg.solve_triangular(R_gg, torch.eye(len(R_gg), device=R_gg.device), upper=True)
        # The group's weights after the updates by all columns before it: W_g + E R_before,g U_gg
        W_g = weight[:, group] + (change[:, :start] @ factor[:start, group]) @ U_gg
        # Column by column: prune, and let the group's later columns make up for it (Algorithm 1)
        if keep_mask is None:
            W_g = _choose_and_update(W_g, R_gg, U_gg, goal, kept[:, group], start)
        else:
            W_g, _ = kernels.obs_columns(W_g, U_gg, kept[:, group])
        # E_g, what later groups read
        change[:, group] = weight[:, group] - W_g
    return weight - change, kept


def _choose_and_update(
    weight: Tensor, factor: Tensor, inverse: Tensor, goal: Goal, kept: Tensor, before: int
) -> Tensor:
    """The updated weights of a group, after `before` columns; its mask is written into `kept`."""
    columns = weight.shape[1]
    part = goal.pattern[1] if goal.pattern else columns  # whose mask is chosen at once
    for start in range(0, columns, part):
        here = slice(start, start + part)
        importance = obs_importance(weight[:, here], factor[here, here])
        if goal.pattern:
            kept[:, here] = keep_n_of_m(importance, *goal.pattern)
        else:
            kept[:, here] = keep_largest(importance, _num_pruned(importance, goal, before))
        weight[:, here], errors = kernels.obs_columns(weight[:, here], inverse[here, here], kept[:, here])
        weight[:, start + part :] -= errors @ inverse[here, start + part :]
    return weight


def _num_pruned(importance: Float[Tensor, "out columns"], goal: Goal, before: int) -> int:
    """Of a group after `before` columns: the floor of its share, or what makes the groups up to here meet theirs."""
    rows, columns = importance.shape
    if not goal.exact:
        return int(importance.numel() * goal.sparsity)
    return round(rows * (before + columns) * goal.sparsity) - round(rows * before * goal.sparsity)


@dataclass(frozen=True)
class SparseGPT:
    """Mask and update group by group. `damping` is relative to the mean diagonal of H."""

    group_size: Count = 128
    damping: Positive = 0.01

    traits = Traits(Hessian)

    def __post_init__(self) -> None:
        check_fields(self, "pruner")

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Any sparsity; N:M when M divides the group size."""
        group = Goal.parse(sparsity, pattern).pattern
        if group and self.group_size % group[1]:
            return [
                f"pattern={pattern}: M must divide pruner.group_size={self.group_size}, so that no group of weights is "
                f"cut in two; set pruner.group_size to a multiple of {group[1]}."
            ]
        return check_unchosen(pattern, "sparsegpt")

    def prune_block(self, task: Task) -> PrunedBlock:
        """One factor for each shared input."""
        keep_masks, weights = self.masks_and_weights(task)
        before = {name: weight * keep_masks[name] for name, weight in task.weights.items()}
        loss_before = probe_loss(task.block, task.inputs, task.targets, before)
        return replace(pruned_by_masks(keep_masks), weights=weights, loss_before=loss_before)

    def masks_and_weights(
        self, task: Task, given: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Keep masks and updated weights [out, in] in fp32 of the block's linears, which are not changed.
        Masks that are `given` are not chosen, and keep as many weights as they say; else those of dead inputs go."""
        weights, keep_masks, dense = {}, {}, task.weights
        goals = goals_of_linears({name: weight.numel() for name, weight in dense.items()}, task.goal)
        for hessian, names in by_shared_input(task.statistics):
            H = hessian.matrix
            factor = upper_factor(H, self.damping, f"{task.block.name}.{names[0]}")
            for name in names:
                keep_mask, weight = given[name] if given else None, dense[name].float()
                if keep_mask is None:
                    weight = weight.masked_fill(dead_inputs(H), 0)
                weights[name], keep_masks[name] = sparsegpt(weight, factor, goals[name], self.group_size, keep_mask)
        return keep_masks, weights
