"""Rows that each keep an N of their own of every M inputs (pattern=N:M): what BESA learns there instead of counts.

Ranks are those within groups of M inputs, so that a row of `in` weights has M levels; giving one up prunes the least
important weight of each of its groups, in / M weights at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    whole = partial(round_to_worth, rows_alike(torch.full_like(worth, group), worth))
    return replace(rows, group=group, rounded=whole, narrowest=BOTH_SIDES)


@dataclass(frozen=True)
class Alike:
    """The rows whose levels are `worth` the same number of weights, by their places among all rows, and how many
    `levels` each has, `most` together. `others`: the greatest common divisor of the worths that are rounded later, 0
    where none is."""

    worth: int
    others: int
    most: int
    rows: Int[Tensor, " alike"]
    levels: Float[Tensor, " alike"]


def rows_alike(levels: Int[Tensor, " row"], worth: Int[Tensor, " row"]) -> tuple[Alike, ...]:
    """Those with the most weights per level first."""
    worths = sorted(set(worth.tolist()), reverse=True)
    rows = [(worth == value).nonzero()[:, 0] for value in worths]
    return tuple(
        Alike(value, math.gcd(*worths[place + 1 :]), int(levels[own].sum()), own, levels[own].double())
        for place, (value, own) in enumerate(zip(worths, rows, strict=True))
    )


def round_to_worth(alike: Sequence[Alike], counts: Float[Tensor, " row"], total: int) -> Int[Tensor, " row"]:
    """Integers in [0, levels] next to `counts` with sum(worth * integers) = total, or the nearest number that whole
    levels reach: what they sum to are the multiples of the greatest common divisor of the worths. On a GPU the host
    waits for none of it.

    Rows of equal worth share a whole number of levels. Those with the most weights per level are rounded first, to a
    count from which the remaining rows can still reach the total exactly; within them the largest remainders are
    rounded up."""
    divisor = math.gcd(*(kind.worth for kind in alike))
    rest = torch.full((), divisor * round(total / divisor), dtype=torch.int64, device=counts.device)
    rounded = torch.zeros_like(counts, dtype=torch.int64)
    for kind in alike:
        own = counts[kind.rows]
        share = _share(kind, own, rest)
        sparsity = project_to_budget(own / kind.levels, kind.levels, share)
        rounded[kind.rows] = round_to_total(kind.levels * sparsity, share)
        rest = rest - share * kind.worth
    return rounded


def _share(kind: Alike, counts: Float[Tensor, " alike"], rest: Int[Tensor, ""]) -> Int[Tensor, ""]:
    """The whole number of levels next to sum(counts) after which the later rows can give up the `rest` exactly; of two
    that are as near the smaller, of none the nearest."""
    wanted = counts.sum() if kind.others else rest.double() / kind.worth
    nearest = wanted.round().clamp(0, kind.most).long()
    if not kind.others:
        return nearest
    tried = wanted.floor().long() + torch.arange(-kind.others, kind.others + 2, device=counts.device)
    fits = (tried >= 0) & (tried <= kind.most) & (tried <= wanted.ceil() + kind.others)
    fits &= (rest - tried * kind.worth) % kind.others == 0
    first = (tried - wanted).abs().masked_fill(~fits, torch.inf).argmin(dim=0, keepdim=True)
    return torch.where(fits.any(), tried.gather(0, first)[0], nearest)
