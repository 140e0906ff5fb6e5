"""DSnoT: edits of a given mask without any training (Zhang et al., ICLR 2024, arXiv 2310.08915); no weight moves.

What a row lacks on average is the sum of its pruned W_ij times x_j, x_j the input summed over a sample's tokens. Cycle
by cycle,

1. of the pruned weights whose W_ij x_j is of the error's sign, that of the largest |W_ij x_j| / Var(x_j) comes back;
2. of the kept weights whose W_ij x_j is of the other sign, that of least Wanda score |W_ij| ||X_j|| goes.

Both lower the error's size. A row stops when that is at most `threshold`, before a cycle that would turn the error's
sign, after `cycles`, or when it has no pair left; each weight moves at most once. So the course of a row is fixed by
two sorted lists, and a running sum shows how far it goes: all rows at once, no loop.

The sums and the choice of both weights are those of the authors' code for unstructured masks. That code by default goes
on after a change of sign, and leaves MLPs as they are; here all linears are edited. Its Var(x_j) is the mean of the
samples' own variances; here it is the variance over all tokens, which does not depend on how tokens are cut into
samples. For N:M both weights are of one group, and a group gives one pair at most; in the authors' code the kept weight
that goes there is the group's least by the first pruner's score, whatever the sign, which may raise the error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from besa_exp.blocks.pruner import PrunedBlock, Task, Traits
from besa_exp.rules import Count, NotNegative, check_fields
from besa_exp.tensors.importance import wanda_importance
from besa_exp.tensors.statistics import InputMoments


def dsnot(
    weight: Float[Tensor, "out in"],
    total: Float[Tensor, " in"],
    variance: Float[Tensor, " in"],
    squared_norm: Float[Tensor, " in"],
    keep_mask: Bool[Tensor, "out in"],
    cycles: int = 50,
    threshold: float = 0.1,
    group: int | None = None,
) -> Bool[Tensor, "out in"]:
    """The edited keep mask: as many kept in every row, and in every `group` consecutive inputs where given."""
    part = weight.float() * total
    error = part.masked_fill(keep_mask, 0).sum(dim=1, keepdim=True)
    part = part * error.sign()
    gain = part / variance.clamp(min=torch.finfo(part.dtype).tiny)
    gain = gain.masked_fill(keep_mask | (part <= 0), -torch.inf)
    cost = wanda_importance(weight, squared_norm).masked_fill(~keep_mask | (part >= 0), torch.inf)
    back, gone = _by_group(gain, cost, group) if group else (_largest(gain, cycles), _largest(-cost, cycles))
    back, gone = back[:, :cycles], gone[:, :cycles]
    after = error.abs() + (part.gather(1, gone) - part.gather(1, back)).cumsum(dim=1)
    before = torch.cat([error.abs(), after[:, :-1]], dim=1)
    is_pair = (gain.gather(1, back) > -torch.inf) & (cost.gather(1, gone) < torch.inf)
    done = (is_pair & (before > threshold) & (after > 0)).cumprod(dim=1).bool()
    edited = keep_mask.scatter(1, back, keep_mask.gather(1, back) | done)
    return edited.scatter(1, gone, edited.gather(1, gone) & ~done)


def _largest(values: Tensor, count: int) -> Tensor:
    """Where the largest of each row lie, in order; on a CPU the first of equals comes first."""
    if values.device.type == "cpu":
        return values.argsort(dim=1, descending=True, stable=True)
    return values.topk(min(count, values.shape[1]), dim=1).indices


def _by_group(gain: Tensor, cost: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Of each group the one that comes back and the one that goes; groups by gain, those without a pair last."""
    starts = torch.arange(0, gain.shape[1], group, device=gain.device)
    best, least = gain.unflatten(1, (-1, group)).max(dim=2), cost.unflatten(1, (-1, group)).min(dim=2)
    order = best.values.masked_fill(least.values.isinf(), -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (starts + best.indices).gather(1, order), (starts + least.indices).gather(1, order)


@dataclass(frozen=True)
class Dsnot:
    """At most `cycles` exchanges a row; `threshold` is the size of error, summed over a sample's tokens, that is left
    alone."""

    cycles: Count = 50
    threshold: NotNegative = 0.1

    traits = Traits(InputMoments)

    def __post_init__(self) -> None:
        check_fields(self, "update")

    def check(self, pattern: str) -> list[str]:
        return []

    def update_block(self, task: Task, pruned: PrunedBlock) -> PrunedBlock:
        """From the dense weights, which stay as they are."""
        group = task.goal.pattern[1] if task.goal.pattern else task.goal.group
        edited = {}
        for name, keep_mask in pruned.keep_masks.items():
            weight, seen = task.weights[name], task.statistics[name]
            order = pruned.permutations.get(name, torch.arange(weight.shape[1], device=weight.device))
            total, variance, norm = (each[order] for each in (seen.total, seen.variance, seen.squared_norm))
            given = (weight[:, order], total, variance, norm, keep_mask[:, order])
            found = dsnot(*given, self.cycles, self.threshold, group)
            edited[name] = found[:, order.argsort()]
        return replace(pruned, keep_masks=edited, weights=None)
