"""Scores of units, and the gradients of a policy's expected loss to them (`policy_gradient`), as pure functions."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from besa_exp.methods.structure.widths import Importances

HALVINGS = 60  # of the interval that holds the shift of a projection
NEAR_ZERO = 1e-7  # the authors', beside s and 1 - s


def sigmap(importance: Float[Tensor, " unit"], keep: float) -> Float[Tensor, " unit"]:
    """Scores whose mean is near `keep`: sigmoid of the standardised importances, shifted; of a block's groups, or its
    channels. Not yet clamped to [0, 1]."""
    mapped = ((importance - importance.mean()) / (importance.std() + 1e-8)).sigmoid()
    return mapped + (keep - mapped.mean())


def starting_scores(importances: Importances, keep: float) -> Importances:
    """s of every unit, block by block."""
    groups, channels = (
        torch.stack([sigmap(row.float(), keep) if len(row) > 1 else torch.full_like(row, keep) for row in rows])
        for rows in (importances.groups, importances.channels)
    )
    return Importances(groups.clamp(0, 1), channels.clamp(0, 1))


def with_one_border(rows: Float[Tensor, "block unit"], kept: int) -> Float[Tensor, "block unit"]:
    """Scores of the same order in each row, of which the `kept` largest lie above one half and the others below: by
    score, every row keeps as many. Where all are kept, the least lies a quarter above."""
    falling = rows.sort(dim=1, descending=True).values
    least = falling[:, kept - 1 : kept]
    next_one = falling[:, kept : kept + 1] if kept < rows.shape[1] else least - 0.5
    return (rows - (least + next_one) / 2 + 0.5).clamp(0, 1)


def moving_baseline(previous: float | None, mean: float, window: int) -> float:
    """The authors' delta: the first step's mean loss, then (1 - 1/T) delta + mean / T, before it is used."""
    return mean if previous is None else (1 - 1 / window) * previous + mean / window


def policy_gradient(
    losses: Float[Tensor, " draw"],
    masks: Bool[Tensor, "draw unit"],
    scores: Float[Tensor, " unit"],
    baseline: float | None = None,
) -> Float[Tensor, " unit"]:
    """g; without a `baseline` that of leave-one-out. Losses that are not a number are left out; 1 / (K - 1) stays."""
    usable = losses.isfinite()
    delta = losses[usable].mean() if baseline is None else baseline
    weights = torch.where(usable, losses - delta, 0.0).to(scores.dtype)
    size = ((scores + NEAR_ZERO) * (1 - scores + NEAR_ZERO)).sqrt()
    directions = (masks.to(scores.dtype) - scores) / size
    return weights @ directions / (len(losses) - 1)


def antithetic_gradient(
    losses: Float[Tensor, "2 pair"], differences: Float[Tensor, "pair unit"]
) -> Float[Tensor, " unit"]:
    """mean of d times half of what differs over sqrt(mean d^2); pairs with a loss that is not a number count as 0."""
    halves = (losses[0] - losses[1]) / 2
    halves = torch.where(halves.isfinite(), halves, 0.0)
    size = halves.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return (halves / size).float() @ differences / (2 * len(halves))


def projected(
    scores: Float[Tensor, " unit"],
    budget: float,
    costs: Float[Tensor, " unit"],
    halvings: int = HALVINGS,
    tolerance: float = 0.0,
) -> Float[Tensor, " unit"]:
    """clamp(s - v, 0, 1) with the least v >= 0 under which sum c_u s_u <= budget: the nearest point by the distance
    sum c_u (s'_u - s_u)^2. Sums below the budget stay below. The authors halve 21 times, to a sum within a `tolerance`
    of 1e-3 of the budget on either side."""
    costs = costs.to(scores)

    def excess(v: float) -> float:
        return float((costs * (scores - v).clamp(0, 1)).sum(dtype=torch.float64)) - budget

    if excess(0.0) <= 0:
        return scores.clamp(0, 1)
    low, high, v = 0.0, float(scores.max()), 0.0
    for _ in range(halvings):
        v = (low + high) / 2
        over = excess(v)
        if abs(over) < tolerance:
            break
        low, high = (v, high) if over > 0 else (low, v)
    return (scores - (v if tolerance else high)).clamp(0, 1)
