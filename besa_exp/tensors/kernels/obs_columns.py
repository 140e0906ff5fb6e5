"""SparseGPT's column loop within a group (Frantar and Alistarh, arXiv 2301.00774, Algorithm 1)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def obs_columns(
    weight: Float[Tensor, "out group"],
    factor: Float[Tensor, "group group"],
    keep_mask: Bool[Tensor, "out group"],
) -> tuple[Float[Tensor, "out group"], Float[Tensor, "out group"]]:
    """Prune the columns of a group from left to right, the later ones making up for each: for the pruned weights of
    column j, e_j = w_j / U_jj, and w_k -= e_j U_jk for k > j. Returns the updated weight, exactly zero where pruned,
    and the errors e, by which the columns after the group are then updated: W_later -= e U_group,later.

    `weight` and `factor` (U, upper triangular, its rows and columns of this group) are fp32; neither is changed."""
    columns = weight.T.contiguous()  # a column at a time is read and written: make it contiguous
    pruned = ~keep_mask.T
    errors = columns.new_zeros(columns.shape)
    for j in range(len(columns)):
        torch.mul(columns[j], pruned[j], out=errors[j]).div_(factor[j, j])
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return columns.T.masked_fill(~keep_mask, 0), errors.T
