"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune column by column, kept weights make up for the pruned.

With H = 2/n X^T X and U the upper Cholesky factor of its damped inverse, removing weight (i, j) with the best update of
the row's later weights adds w^2 / U_jj^2 to the squared error; the update is w_i,k -= (w_ij / U_jj) U_jk for k > j.
Columns go in groups: the mask of a group is chosen when the group is reached, lowest w^2 / U_jj^2 first over all rows.

The authors' threshold takes one weight too many per group (`<=` against the sorted value at the count); here the count
is exact. With a mask given, the result does not depend on the group size.

U itself is never formed. With R = U^-1, which is upper triangular too and R R^T = H, and E = W - W_hat the change of
the columns before group g, the weights that the group is met with are

    W_g + E R_before,g (R_g,g)^-1

(the form that QuIP, Chee et al., arXiv 2307.13304, proves equal). So H is factored once and not inverted, and each
group is written once, where updating all later columns after every group writes them over and over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from besa_exp.blocks.block import Block
from besa_exp.blocks.probe import probe_loss
from besa_exp.blocks.pruner import PrunedBlock, pruned_by_masks
from besa_exp.tensors import kernels
from besa_exp.tensors.hessian import dead_inputs, upper_factor
from besa_exp.tensors.importance import obs_importance
from besa_exp.tensors.masks import Target, keep_largest, keep_n_of_m, targets_of_linears
from besa_exp.tensors.pattern import check_unchosen
from besa_exp.tensors.statistics import Hessian, by_shared_input


def sparsegpt(
    weight: Float[Tensor, "out in"],
    factor: Float[Tensor, "in in"],
    target: Target,
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
        own = factor[group, group]
        inverse = torch.linalg.solve_triangular(
            own, torch.eye(len(own), device=own.device), upper=True
        )  # U of the group
        met = weight[:, group] + (change[:, :start] @ factor[:start, group]) @ inverse
        if keep_mask is None:
            updated = _choose_and_update(met, own, inverse, target, kept[:, group], start)
        else:
            updated, _ = kernels.obs_columns(met, inverse, kept[:, group])
        change[:, group] = weight[:, group] - updated
    return weight - change, kept


def _choose_and_update(
    weight: Tensor, factor: Tensor, inverse: Tensor, target: Target, kept: Tensor, before: int
) -> Tensor:
    """The updated weights of a group, after `before` columns; its mask is written into `kept`."""
    columns = weight.shape[1]
    part = target.pattern[1] if target.pattern else columns  # whose mask is chosen at once
    for start in range(0, columns, part):
        here = slice(start, start + part)
        importance = obs_importance(weight[:, here], factor[here, here])
        if target.pattern:
            kept[:, here] = keep_n_of_m(importance, *target.pattern)
        else:
            kept[:, here] = keep_largest(importance, _num_pruned(importance, target, before))
        weight[:, here], errors = kernels.obs_columns(weight[:, here], inverse[here, here], kept[:, here])
        weight[:, start + part :] -= errors @ inverse[here, start + part :]
    return weight


def _num_pruned(importance: Float[Tensor, "out columns"], target: Target, before: int) -> int:
    """Of a group after `before` columns: the floor of its share, or what makes the groups up to here meet theirs."""
    rows, columns = importance.shape
    if not target.exact:
        return int(importance.numel() * target.sparsity)
    return round(rows * (before + columns) * target.sparsity) - round(rows * before * target.sparsity)


@dataclass(frozen=True)
class SparseGPT:
    """Mask and update group by group. `damping` is relative to the mean diagonal of H."""

    group_size: int = 128
    damping: float = 0.01

    statistic = Hessian
    dense_targets = False

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"pruner.group_size={self.group_size}: must be at least 1; the paper uses 128")
        if not self.damping > 0:
            raise ValueError(f"pruner.damping={self.damping}: must be above 0; the paper uses 0.01")

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Any sparsity; N:M when M divides the group size."""
        group = Target.parse(sparsity, pattern).pattern
        if group and self.group_size % group[1]:
            return [
                f"pattern={pattern}: M must divide pruner.group_size={self.group_size}, so that no group of weights is "
                f"cut in two; set pruner.group_size to a multiple of {group[1]}."
            ]
        return check_unchosen(pattern, "sparsegpt")

    def prune_block(self, block, inputs, targets, statistics, target, on_step) -> PrunedBlock:
        """One factor for each shared input."""
        keep_masks, weights = self.masks_and_weights(block, statistics, target)
        before = {name: linear.weight.detach() * keep_masks[name] for name, linear in block.linears.items()}
        loss_before = probe_loss(block, inputs, targets, before)
        return replace(pruned_by_masks(keep_masks), weights=weights, loss_before=loss_before)

    def masks_and_weights(
        self,
        block: Block,
        statistics: Mapping[str, Hessian],
        target: Target,
        given: Mapping[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Keep masks and updated weights [out, in] in fp32 of the block's linears, which are not changed.
        Masks that are `given` are not chosen."""
        weights, keep_masks = {}, {}
        targets = targets_of_linears({name: linear.weight.numel() for name, linear in block.linears.items()}, target)
        for hessian, names in by_shared_input(statistics):
            matrix = hessian.matrix
            factor = upper_factor(matrix, self.damping, f"{block.name}.{names[0]}")
            for name in names:
                weight = block.linears[name].weight.detach().float()
                weight = weight.masked_fill(dead_inputs(matrix), 0)
                weights[name], keep_masks[name] = sparsegpt(
                    weight, factor, targets[name], self.group_size, given[name] if given else None
                )
        return keep_masks, weights
