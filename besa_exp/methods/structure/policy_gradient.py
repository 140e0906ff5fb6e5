"""Bypass Back-propagation: heads and channels chosen by the policy gradient of the model's loss (Gao et al., arXiv
2406.10576). Forward passes alone.

Each unit u, a group of heads or a channel, stays with probability s_u. In a step K masks m_k are drawn, the loss L_k
of the model under each is measured on one batch, and

    g = 1 / (K - 1) sum_k (L_k - delta) (m_k - s) / sqrt(s (1 - s)),    s <- P(s - rate g),

P the projection onto {0 <= s <= 1, sum c_u s_u <= B}, which is s' = clamp(s - v, 0, 1) with one v. Times
sqrt(s (1 - s)) the score of a Bernoulli has unit variance for every unit.

The baseline delta is here the mean of the step's own losses, with which 1 / (K - 1) makes g the leave-one-out
estimator, unbiased and without memory: E[g] = sqrt(s (1 - s)) dE[L]/ds. The authors' is a moving average that holds a
share 1 / T of the present losses, so that their g is K / (K - 1) (1 - 1 / (T K)) times that. Theirs are also budgets of
heads and of channels apart, each a share of their number; here c_u are parameters and B is one for all.

The draws of a step come from the seed and its number, on the CPU: they are the same on every device, and a search goes
on from a state alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from besa_exp.checkpoints.narrowed_config import SAVED_AS
from besa_exp.checkpoints.structure import Costs, Dimensions, Structure
from besa_exp.errors import RunError, check_fields, one_of, within
from besa_exp.machine import distributed
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.descent import falling
from besa_exp.methods.structure.method import DenseModel
from besa_exp.methods.structure.sleb import summed_entropies
from besa_exp.methods.structure.widths import (
    IMPORTANCES,
    SHAPES,
    Importances,
    chosen,
    importances_by_name,
    kept_parameters,
    masked,
    width_amount_problems,
)

KEPT_EVERY = 10  # steps
HALVINGS = 60  # of the interval that holds the shift of a projection
NEAR_ZERO = 1e-7  # the authors', beside s and 1 - s
BASELINES = ("leave_one_out", "moving")


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


@dataclass(frozen=True)
class State:
    """Where a search stands after `step` steps: the scores of all groups of all blocks, then of all channels; the
    moving baseline, where there is one; the last step's losses."""

    step: int
    scores: Float[Tensor, " unit"]
    baseline: float | None = None
    losses: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: every fp32 score exactly."""
        losses = [loss if math.isfinite(loss) else None for loss in self.losses]
        return {"step": self.step, "scores": self.scores.tolist(), "baseline": self.baseline, "losses": losses}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> State:
        losses = tuple(math.nan if loss is None else loss for loss in values["losses"])
        return State(values["step"], torch.tensor(values["scores"]), values["baseline"], losses)


LossOf = Callable[[Bool[Tensor, "block group"], Bool[Tensor, "block channel"], int], float]
"""Groups and channels that stay, and the step, which says the batch, to the mean loss of the batch's tokens."""


@dataclass(frozen=True)
class PolicyGradient:
    """`ratio` of all parameters go. `draws`: masks a step. `rate`: of the first step. `start`: whose importances the
    scores begin with. `multiple`: of which a block's channels are a multiple in the end. `window`: of the moving
    baseline, the authors'. `save`: how blocks of `shape` uneven are saved."""

    ratio: float
    steps: int = 1000
    draws: int = 2
    rate: float = 0.002
    start: str = "wanda_sp"
    baseline: str = "leave_one_out"
    window: int = 5
    multiple: int = 1
    shape: str = "uniform"
    save: str = "padded"
    seed: int = 0

    narrows = True

    def __post_init__(self) -> None:
        check_fields(self, "structure", within(least=1), "steps", "window", "multiple")
        check_fields(self, "structure", within(least=2), "draws")
        check_fields(self, "structure", within(above=0, note="the authors use 0.002 for Llama-2-7B"), "rate")
        check_fields(self, "structure", within(above=0, below=1), "ratio")
        check_fields(self, "structure", one_of(*BASELINES), "baseline")
        check_fields(self, "structure", one_of(*SHAPES), "shape")
        check_fields(self, "structure", one_of(*IMPORTANCES), "start")
        check_fields(self, "structure", one_of(*SAVED_AS), "save")

    @property
    def saved_as(self) -> str | None:
        """How uneven blocks are saved; None: they are even."""
        return None if self.shape == "uniform" else self.save

    def check(self, costs: Costs, dimensions: Dimensions) -> list[str]:
        return width_amount_problems(costs, dimensions, self.ratio, self.multiple)

    def choose(self, dense: DenseModel, progress: Progress, on_progress: Callable[[str], None]) -> Structure:
        """Every KEPT_EVERY steps are kept. A step's batch are the next `batch_size` samples, in turn."""
        costs, dimensions = dense.costs, dense.dimensions
        if found := progress.read():
            state = State.from_dict(found)
            on_progress(f"going on after step {state.step}")
        else:
            on_progress(f"importances of {self.start}")
            importances = importances_by_name(self.start, dense, 1 - self.ratio, self.seed)
            state = self.begin(importances, costs, dimensions)
        for reached in self.search(loss_on(dense), state, costs, dimensions):
            state = reached
            if state.step % KEPT_EVERY == 0 or state.step == self.steps:
                progress.write(state.to_dict())
                mean = sum(state.losses) / len(state.losses)
                on_progress(f"step {state.step} of {self.steps}, mean loss {mean:.4g}")
        return self.decide(state, costs, dimensions)

    def begin(self, importances: Importances, costs: Costs, dimensions: Dimensions) -> State:
        """From the importances that `start` names; within the budget."""
        units, spendable = unit_costs(costs, dimensions), self._spendable(costs, dimensions)
        scores = starting_scores(importances, min(1.0, spendable / float(units.sum()))).flat
        return State(0, projected(scores, spendable, units))

    def search(self, loss_of: LossOf, state: State, costs: Costs, dimensions: Dimensions) -> Iterator[State]:
        """The states of the steps that are left after `state`. RunError: fewer than two losses of a step are finite."""
        units, spendable = unit_costs(costs, dimensions), self._spendable(costs, dimensions)
        while state.step < self.steps:
            masks = self.drawn(state)
            found = [loss_of(*_apart(mask, dimensions), state.step) for mask in masks]
            losses = torch.tensor(found, dtype=torch.float64)
            if int(losses.isfinite().sum()) < 2:
                raise RunError(
                    f"structure=policy_gradient: the losses of step {state.step} are {losses.tolist()}; load the model "
                    "in float32 or bfloat16 (model.dtype) or take more draws a step (structure.draws)"
                )
            mean = float(losses[losses.isfinite()].mean())
            moving = moving_baseline(state.baseline, mean, self.window) if self.baseline == "moving" else None
            rate = self.rate * falling(state.step, self.steps)
            step = rate * policy_gradient(losses, masks, state.scores, moving)
            scores = projected(state.scores - step, spendable, units)
            state = State(state.step + 1, scores, moving, tuple(losses.tolist()))
            yield state

    def drawn(self, state: State) -> Bool[Tensor, "draw unit"]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + state.step)
        return torch.rand(self.draws, len(state.scores), generator=generator) < state.scores

    def decide(self, state: State, costs: Costs, dimensions: Dimensions) -> Structure:
        """What stays: the units of largest score that the budget holds."""
        scores = Importances(*_apart(state.scores, dimensions))
        return chosen(scores, costs, dimensions, self.ratio, self.multiple, self.shape)

    def _spendable(self, costs: Costs, dimensions: Dimensions) -> float:
        """Parameters for units: the budget less what no unit holds."""
        all_units = float(unit_costs(costs, dimensions).sum())
        return kept_parameters(costs, self.ratio) - (costs.total - all_units)


def loss_on(dense: DenseModel) -> LossOf:
    """Of the tokens of a step's batch, which the ranks share, block by block under the masks."""
    inputs, head, length = dense.inputs(), dense.head(), dense.input_ids.shape[1]
    samples = dense.num_samples

    @torch.no_grad()
    def loss(groups: Bool[Tensor, "block group"], channels: Bool[Tensor, "block channel"], step: int) -> float:
        numbers = ((torch.arange(dense.batch_size) + step * dense.batch_size) % samples).unique()
        own = distributed.own_places(numbers)
        states = inputs[own.to(inputs.device)]
        for place, block in enumerate(dense.blocks()):
            with masked(block, groups[place], channels[place], dense.dimensions):
                states = block.outputs(states, dense.batch_size)
        (total,) = summed_entropies(head, dense.input_ids[own], [states])
        return float(distributed.all_sum(total)) / (len(numbers) * (length - 1))

    return loss


def unit_costs(costs: Costs, dimensions: Dimensions) -> Float[Tensor, " unit"]:
    """Parameters of each group of all blocks, then of each channel."""
    groups = torch.tensor(costs.groups).repeat_interleave(dimensions.groups)
    channels = torch.tensor(costs.channels).repeat_interleave(dimensions.channels)
    return torch.cat([groups, channels]).float()


def _apart(units: Tensor, dimensions: Dimensions) -> list[Tensor]:
    """What is known of all units, as [block group] and [block channel]."""
    counts = [dimensions.blocks * dimensions.groups, dimensions.blocks * dimensions.channels]
    return [part.view(dimensions.blocks, -1) for part in units.split(counts)]
