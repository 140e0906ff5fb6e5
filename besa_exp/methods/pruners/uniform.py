"""The same sparsity everywhere, by any importance, no update: Wanda, magnitude pruning, RIA.

| preset | importance | shared by |
|---|---|---|
| magnitude (Han et al., arXiv 1506.02626) | |W| | linear |
| wanda (Sun et al., arXiv 2306.11695) | |W| ||X|| | row |
| ria (Zhang et al., ICLR 2024) | a weight's share of its row and of its column, times ||X||^0.5 | linear |

RIA sets a weight beside all others of its linear, which is what its shares of rows and columns are for: rows that
magnitude pruning would empty keep their largest weights. Its authors' code does so unless told to prune within rows,
which it calls Wanda's way. N:M is within rows whatever the granularity.

`permute`, of RIA: choose which inputs make up the groups of N:M (`besa_exp.tensors.permutation`). The weights keep
their own order, so that the model loads as any other; the order in which the masks are N:M is kept beside them, and
whoever runs N:M products gathers the inputs by it. Linears that are given the same inputs share one order, so that one
gather serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from besa_exp.blocks.pruner import PrunedBlock, Task, Traits, pruned_by_masks
from besa_exp.rules import check_fields, one_of
from besa_exp.tensors.importance import Importance, ImportanceName, importance_name, importance_of
from besa_exp.tensors.masks import Goal, goals_of_linears, keep_largest, keep_n_of_m, keep_per_row
from besa_exp.tensors.pattern import check_unchosen, fixes_sparsity
from besa_exp.tensors.permutation import keep_n_of_m_permuted, permuted_for
from besa_exp.tensors.statistics import InputNorm, by_shared_input


@dataclass(frozen=True)
class Uniform:
    """Prunes the floor(sparsity * in) least important weights of every row, or the round(sparsity * weights) least
    important ones of every linear (`granularity`), or N:M; under a budget over depth as many as this gives the
    block."""

    importance: Importance | ImportanceName = "wanda"
    granularity: Annotated[str, one_of("row", "linear")] = "row"
    permute: bool = False

    def __post_init__(self) -> None:
        importance_of(self.importance)  # which refuses an unknown name
        check_fields(self, "pruner")

    @property
    def traits(self) -> Traits:
        importance = importance_of(self.importance)
        shared_inputs = InputNorm if self.permute else None  # a statistic shows which linears share their inputs
        statistic = importance.statistic or shared_inputs
        return Traits(statistic, importance.gradients, blind=not (statistic or importance.gradients))

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Any sparsity, any N:M whose N is given; there must be groups where they are to be chosen."""
        if self.permute and not fixes_sparsity(pattern):
            return [f"pruner.permute=true: pattern={pattern} has no groups of N:M to choose; use pattern=2:4, or false"]
        return check_unchosen(pattern, importance_name(self.importance))

    def prune_block(self, task: Task) -> PrunedBlock:
        importance = importance_of(self.importance)
        if self.permute:
            return self._permuted({name: task.score(importance, name) for name in task.block.linears}, task)
        goals = goals_of_linears({name: weight.numel() for name, weight in task.weights.items()}, task.goal)
        return pruned_by_masks({name: self._keep_mask(task.score(importance, name), goals[name]) for name in goals})

    def _keep_mask(self, importance: Tensor, goal: Goal) -> Tensor:
        if self.granularity == "row":
            return keep_per_row(importance, goal)
        if goal.pattern:
            return keep_n_of_m(importance, *goal.pattern)
        return keep_largest(importance, round(goal.sparsity * importance.numel()))

    def _permuted(self, scores: Mapping[str, Tensor], task: Task) -> PrunedBlock:
        """N:M in an order of the inputs that keeps more, one for all linears that are given the same inputs."""
        assert task.goal.pattern, "there are no groups to choose"
        orders: dict[str, Tensor] = {}
        for _, names in by_shared_input(task.statistics):
            order = permuted_for(torch.cat([scores[name] for name in names]), *task.goal.pattern)
            orders |= dict.fromkeys(names, order)
        masks = {name: keep_n_of_m_permuted(score, orders[name], *task.goal.pattern) for name, score in scores.items()}
        return replace(pruned_by_masks(masks), permutations=orders)
