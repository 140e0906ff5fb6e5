"""Rows that each keep an N of their own of every M inputs (pattern=N:M): what BESA learns there instead of counts.

Ranks are those within groups of M inputs, so that a row of `in` weights has M levels; giving one up prunes the least
important weight of each of its groups, in / M weights at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from besa_exp.methods.allocation import Rows, project_to_budget
from besa_exp.tensors.masks import rank_in_group, round_to_total

BOTH_SIDES = 2.0  # levels: of a group at least the last weight that goes and the first that stays


def rows_of_groups(
    weights: Mapping[str, Tensor], importance_of: Callable[[str], Tensor], granularity: str, group: int
) -> Rows:
    """`Rows` whose levels are the ranks within `group` consecutive inputs."""
    rows = Rows.of(weights, importance_of, granularity, partial(rank_in_group, group=group))
    worth = rows.columns.long() // group
    whole = partial(round_to_worth, torch.full_like(worth, group), worth)
    return replace(rows, group=group, rounded=whole, narrowest=BOTH_SIDES)


def round_to_worth(
    levels: Int[Tensor, " row"], worth: Int[Tensor, " row"], counts: Float[Tensor, " row"], total: int
) -> Int[Tensor, " row"]:
    """Integers in [0, levels] next to `counts` with sum(worth * integers) = total, or the nearest number that whole
    levels reach: what they sum to are the multiples of the greatest common divisor of the worths.

    Rows of equal worth share a whole number of levels. Rows with the most weights per level are rounded first, to a
    count from which the remaining rows can still reach the total exactly; within them the largest remainders are
    rounded up."""
    weights_per_level = sorted(set(worth.tolist()), reverse=True)
    divisor = math.gcd(*weights_per_level)
    rest = divisor * round(total / divisor)
    rounded = torch.zeros_like(levels)
    for place, value in enumerate(weights_per_level):
        alike = worth == value
        others = math.gcd(*weights_per_level[place + 1 :])  # of none: 0
        most = int(levels[alike].sum())
        wanted = rest / value if not others else float(counts[alike].sum())
        nearest = sorted(
            range(max(0, math.floor(wanted) - others), min(most, math.ceil(wanted) + others) + 1),
            key=lambda n: abs(n - wanted),
        )
        fits = (n for n in nearest if others and (rest - n * value) % others == 0)
        share = next(fits, min(max(round(wanted), 0), most))
        capacity = levels[alike].double()
        rounded[alike] = round_to_total(capacity * project_to_budget(counts[alike] / capacity, capacity, share), share)
        rest -= share * value
    return rounded
