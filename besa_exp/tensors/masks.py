"""Which weights go: counts in integers, ranks, keep masks and the N:M pattern.

The published threshold form, `threshold = sort(importance)[k]; prune = importance <= threshold`, prunes k + 1 weights
and more on ties. Here every selection is by rank in a stable sort, so exactly k weights go and ties go by position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from besa_exp.tensors import kernels
from besa_exp.tensors.kernels.numpy_rows import in_order
from besa_exp.tensors.pattern import parse_pattern
from besa_exp.tensors.selection import LONG, kth_smallest


@dataclass(frozen=True)
class Goal:
    """What a block gives up: a sparsity in [0, 1), or N kept of every M consecutive inputs (which fixes it), or a
    sparsity reached by rows that each keep an N of their own of every `group` consecutive inputs.

    `exact`: the block loses exactly the number of weights that a budget over depth gave it. Otherwise pruners that
    are published with a floor for every row or group use that floor: their numbers are compared with the papers'."""

    sparsity: float
    pattern: tuple[int, int] | None = None
    group: int | None = None
    exact: bool = False

    @staticmethod
    def parse(sparsity: float, pattern: str) -> Goal:
        """Read `pattern` as `parse_pattern` does. ValueError: it is none."""
        found = parse_pattern(pattern)
        if found is None:
            return Goal(sparsity)
        kept, group = found
        return Goal(sparsity, group=group) if kept is None else Goal(1 - kept / group, (kept, group))


def keep_by_rank(rank: Int[Tensor, "out in"], pruned: Int[Tensor, " out"]) -> Bool[Tensor, "out in"]:
    """Keep mask that prunes the `pruned[row]` least important weights of each row."""
    return rank >= pruned.to(rank.dtype)[:, None]


def keep_largest(importance: Float[Tensor, "out in"], pruned: int) -> Bool[Tensor, "out in"]:
    """Keep mask that prunes exactly the `pruned` least important weights of the whole matrix."""
    return keep_largest_of_rows(importance.reshape(1, -1), pruned).view_as(importance)


def keep_largest_of_rows(importance: Float[Tensor, "out in"], pruned: int) -> Bool[Tensor, "out in"]:
    """Keep mask that prunes exactly the `pruned` least important weights of each row; of equals, the first go."""
    if pruned == 0:
        return torch.ones_like(importance, dtype=torch.bool)
    threshold = _smallest_of_rows(importance, pruned)
    keep_mask = (importance <= threshold).logical_not_()  # and not `>`: NaN stays, and is noticed
    if keep_mask.count_nonzero() != importance.numel() - len(importance) * pruned:
        tied = importance == threshold
        more = importance.shape[1] - pruned - keep_mask.sum(dim=1, keepdim=True)
        keep_mask |= tied & (tied.cumsum(dim=1) > tied.sum(dim=1, keepdim=True) - more)
    return keep_mask


def _smallest_of_rows(importance: Float[Tensor, "out in"], k: int) -> Float[Tensor, "out 1"]:
    """The k-th smallest of each row, by whatever is fast on the device."""
    if importance.device.type == "cpu":
        return in_order(importance, k - 1)
    if importance.shape[1] > LONG:
        return torch.stack([kth_smallest(row, k) for row in importance.float()])[:, None].to(importance.dtype)
    return importance.kthvalue(k, dim=1, keepdim=True).values


def rank_in_group(importance: Float[Tensor, "out in"], group: int) -> Int[Tensor, "out in"]:
    """Position of each weight among its `group` consecutive inputs of the row, 0 = least important;
    `group` must divide `in`."""
    assert importance.shape[1] % group == 0, "a group would lie in two rows"
    return kernels.rank_in_row(importance.reshape(-1, group)).view(importance.shape)


def keep_n_of_m(importance: Float[Tensor, "out in"], kept: int, group: int) -> Bool[Tensor, "out in"]:
    """Keep the `kept` most important of every `group` consecutive inputs of a row; `group` must divide `in`."""
    return rank_in_group(importance, group) >= group - kept


def keep_per_row(importance: Float[Tensor, "out in"], goal: Goal) -> Bool[Tensor, "out in"]:
    """The uniform allocation per row: N:M, or the floor(sparsity * in) least important weights of every row (Wanda).
    Where the goal is exact, k of some rows and k + 1 of those whose next weight matters least."""
    assert goal.group is None, "rows that keep N of M each are chosen, not uniform"
    if goal.pattern:
        return keep_n_of_m(importance, *goal.pattern)
    if goal.exact:
        return keep_rows_to_the_weight(importance, round(goal.sparsity * importance.numel()))
    return keep_largest_of_rows(importance, int(importance.shape[1] * goal.sparsity))


def keep_rows_to_the_weight(importance: Float[Tensor, "out in"], pruned: int) -> Bool[Tensor, "out in"]:
    """Keep mask that prunes exactly `pruned` weights: the k least important of each row, and one more of the rows where
    that one matters least; of equals, the first go."""
    each, more = divmod(pruned, len(importance))
    keep_mask = keep_largest_of_rows(importance, each)
    if more:
        following = importance.masked_fill(~keep_mask | importance.isnan(), torch.inf)  # NaN stays, and is noticed
        columns = following.argmin(dim=1)
        rows = torch.argsort(following.gather(1, columns[:, None])[:, 0], stable=True)[:more]
        keep_mask[rows, columns[rows]] = False
    return keep_mask


def goals_of_linears(sizes: Mapping[str, int], goal: Goal) -> dict[str, Goal]:
    """The goal of each linear of a block, of `sizes` weights: the block's own, or where that is exact one of a whole
    number of weights, which sum to the block's."""
    if not goal.exact:
        return dict.fromkeys(sizes, goal)
    weights = torch.tensor([*sizes.values()], dtype=torch.float64)
    counts = round_to_total(weights * goal.sparsity, round(goal.sparsity * sum(sizes.values())))
    return {
        name: replace(goal, sparsity=count / size)
        for (name, size), count in zip(sizes.items(), counts.tolist(), strict=True)
    }


def floor_of(counts: Float[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """floor of fp64 products that are no counts yet but for rounding: 90 * 0.7 is 62.99999999999999 there, and 63 here.
    fp32 miscounts the millions of a large linear."""
    assert counts.dtype == torch.float64, f"floor_of takes fp64, not {counts.dtype}"
    return (counts * (1 + 1e-12)).long()


def round_to_total(counts: Float[Tensor, " rows"], total: int | Int[Tensor, ""]) -> Int[Tensor, " rows"]:
    """Integers next to `counts` that sum to exactly `total`: the largest remainders are rounded up, ties by position.

    `total` must lie between the sums of the floors and of the ceilings."""
    rounded = counts.floor().long()
    up = torch.arange(counts.numel(), device=counts.device) < total - rounded.sum()
    remainders = (counts - rounded).mul(2**20).round()  # equal ones differ in their last bits, by the order of sums
    order = torch.argsort(remainders, descending=True, stable=True)
    rounded[order] += up
    return rounded
