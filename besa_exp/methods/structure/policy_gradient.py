"""Bypass Back-propagation: heads and channels chosen by the policy gradient of the model's loss (Gao et al., arXiv
2406.10576). Forward passes alone.

Each unit u, a group of heads or a channel, has a score s_u. A draw is the structure that would be decided if the scores
were s + e, with e normal: it has the size and the shape that are asked for. A unit's noise has a part of its own, of
spread / sqrt(units in its row), a row being a block's groups or a block's channels, and one that its row shares, of
spread / sqrt(rows): how many a block keeps is asked apart from which. In a step every sample of a batch is measured
under a pair of draws of its own, m with e and m' with -e (antithetic), and

    g = mean over pairs of d x / sqrt(mean d^2),  d = (L(m) - L(m')) / 2,    s <- s - rate g * (that part's size),

x being (m - m') / 2 of a unit, and of a row its share of e in units of that part's size. E[d x] of a unit is the
covariance of the loss with the unit's staying, as far as both change with the sign of e: the gradient of E[L] to s of
the policy p(m) ~ exp(<s, m>) over the allowed structures, which such noise draws from nearly (perturb and maximise:
Papandreou and Yuille, ICCV 2011); of a row it is E[L e], the gradient to the mean of normal noise. Few units differ
between the draws of a pair, those near the border; all others stand still. A quarter of the samples (the probe) is not
learned from and judges what would be decided, `checks` times, the start first: what lowers its loss by more than the
standard error is a new best, what raises it by more is undone, and the spread and with it the steps shrink. So the
result is never worse than the start on the probe.

The authors' estimator is `baseline=moving`: s_u is a unit's probability to stay, K masks m_k are drawn by it, every one
for the whole batch, and

    g = 1 / (K - 1) sum_k (L_k - delta) (m_k - s) / sqrt(s (1 - s)),    s <- P(s - rate g),

P the projection onto {0 <= s <= 1, sum c_u s_u <= B}, which is s' = clamp(s - v, 0, 1) with one v. delta is a moving
average that holds a share 1 / T of the present losses, so that E[g] = K / (K - 1) (1 - 1 / (T K)) sqrt(s (1 - s))
dE[L]/ds; `leave_one_out`, the mean of the step's own losses, needs no memory and has no such factor. Theirs are also
budgets of heads and of channels apart, each a share of their number; here c_u are parameters and B is one for all.

The draws of a step come from the seed and its number, on the CPU: they are the same on every device, and a search goes
on from a state alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from besa_exp.blocks.head import summed_entropies
from besa_exp.checkpoints.narrowed_config import SAVED_AS
from besa_exp.checkpoints.structure import Costs, Dimensions, Structure
from besa_exp.errors import RunError
from besa_exp.machine import distributed
from besa_exp.methods.budgets.budget import Work
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.descent import SHRINK, falling
from besa_exp.methods.structure.estimators import (
    antithetic_gradient,
    moving_baseline,
    policy_gradient,
    projected,
    starting_scores,
    with_one_border,
)
from besa_exp.methods.structure.method import DenseModel
from besa_exp.methods.structure.widths import (
    IMPORTANCES,
    Importances,
    chosen_units,
    even_widths,
    importance_work,
    importances_by_name,
    kept_parameters,
    masked,
    structure_of,
    width_amount_problems,
)
from besa_exp.rules import Count, CountOrZero, Fraction, Positive, Seed, check_fields, one_of, within

KEPT_EVERY = 10  # steps
PROBE = 4  # one of so many samples judges: twice the usual share, as losses of tokens tell little


@dataclass(frozen=True)
class State:
    """Where a search stands after `step` steps: the scores of all groups of all blocks, then of all channels; the
    moving baseline, where there is one; the last step's losses; the best scores that the probe saw, their loss there,
    and what the steps have shrunk to."""

    step: int
    scores: Float[Tensor, " unit"]
    baseline: float | None = None
    losses: tuple[float, ...] = ()
    best: Float[Tensor, " unit"] | None = None
    best_losses: tuple[float, ...] = ()
    shrunk: float = 1.0

    @property
    def probe_loss(self) -> float:
        """At the best."""
        return sum(self.best_losses) / len(self.best_losses)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: every fp32 score exactly."""
        losses = [loss if math.isfinite(loss) else None for loss in self.losses]
        scores, best = (None if units is None else units.tolist() for units in (self.scores, self.best))
        return {**vars(self), "scores": scores, "losses": losses, "best": best}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> State:
        losses = tuple(math.nan if loss is None else loss for loss in values["losses"])
        best = None if values["best"] is None else torch.tensor(values["best"])
        read = {"scores": torch.tensor(values["scores"]), "losses": losses, "best": best}
        return State(**{**values, **read, "best_losses": tuple(values["best_losses"])})


LossesOf = Callable[[Bool[Tensor, "row unit"], Int[Tensor, " row"]], Float[Tensor, " row"]]
"""Masks of units, and for each the number of a sample, to the mean loss of the sample's tokens under its mask."""


@dataclass(frozen=True)
class Searched:
    """What a search asks a model: its size, and the losses of its samples, of which a step takes `batch_size`."""

    losses: LossesOf
    costs: Costs
    dimensions: Dimensions
    num_samples: int
    batch_size: int

    @property
    def probe(self) -> Int[Tensor, " sample"]:
        """The last samples."""
        return torch.arange(self.num_samples - max(1, self.num_samples // PROBE), self.num_samples)

    def batch(self, step: int, judged: bool) -> Int[Tensor, " sample"]:
        """The next samples, in turn, of those that are learned from: all but the probe, where that judges."""
        learned = max(1, self.num_samples - len(self.probe)) if judged else self.num_samples
        size = min(self.batch_size, learned)
        return (torch.arange(size) + step * size) % learned


@dataclass(frozen=True)
class PolicyGradient:
    """`ratio` of all parameters go. `draws`: masks that a sample of a step is measured under. `spread`: of the noise of
    antithetic draws, in scores, which lie in [0, 1]. `rate`: of the first step, in sizes of the noise; with independent
    draws in probability. `checks`: how often the probe judges; 0: never, the last state is taken. `start`: whose
    importances the scores begin with. `multiple`: of which a block's channels are a multiple in the end. `window`: of
    the moving baseline, the authors'. `save`: how blocks of `shape` uneven are saved."""

    ratio: Fraction
    steps: Count = 1000
    draws: Annotated[int, within(least=2)] = 2
    rate: Positive = 0.2
    spread: Positive = 0.25
    checks: CountOrZero = 10
    start: Annotated[str, one_of(*IMPORTANCES)] = "wanda_sp"
    baseline: Annotated[str, one_of("antithetic", "leave_one_out", "moving")] = "antithetic"
    window: Count = 5
    multiple: Count = 1
    shape: Annotated[str, one_of("uniform", "uneven")] = "uniform"
    save: Annotated[str, one_of(*SAVED_AS)] = "padded"
    seed: Seed = 0

    narrows = True

    def __post_init__(self) -> None:
        check_fields(self, "structure")
        if self.baseline == "antithetic" and self.draws % 2:
            raise ValueError(f"structure.draws={self.draws}: antithetic draws come in pairs; set an even number")

    @property
    def saved_as(self) -> str | None:
        """How uneven blocks are saved; None: they are even."""
        return None if self.shape == "uniform" else self.save

    def check(self, costs: Costs, dimensions: Dimensions) -> list[str]:
        return width_amount_problems(costs, dimensions, self.ratio, self.multiple)

    def work(self, costs: Costs, num_samples: int, batch_size: int) -> Work:
        """The draws of all steps, and the probe for each judgement."""
        rows = self.steps * self.draws * batch_size
        if self.checks:
            judgements = 1 + math.ceil(self.steps / math.ceil(self.steps / self.checks))
            rows += judgements * max(1, num_samples // PROBE)
        return Work(0, importance_work(self.start, costs, num_samples).passes + rows * len(costs.blocks), rows)

    def choose(self, dense: DenseModel, progress: Progress, on_progress: Callable[[str], None]) -> Structure:
        """Every KEPT_EVERY steps are kept."""
        costs, dimensions = dense.costs, dense.dimensions
        if found := progress.read():
            state = State.from_dict(found)
            on_progress(f"going on after step {state.step}")
        else:
            on_progress(f"importances of {self.start}")
            kept = even_widths(costs, dimensions, self.ratio, self.multiple)
            importances = importances_by_name(self.start, dense, kept, self.seed)
            state = self.begin(importances, costs, dimensions)
        model = Searched(losses_on(dense), costs, dimensions, dense.num_samples, dense.batch_size)
        for reached in self.search(model, state):
            state = reached
            if state.step % KEPT_EVERY == 0 or state.step == self.steps:
                progress.write(state.to_dict())
                mean = sum(state.losses) / len(state.losses)
                judged = f", {state.probe_loss:.4g} on the probe at best" if self.checks else ""
                on_progress(f"step {state.step} of {self.steps}, mean loss {mean:.4g}{judged}")
        return self.decide(state, costs, dimensions)

    def begin(self, importances: Importances, costs: Costs, dimensions: Dimensions) -> State:
        """From the importances that `start` names; within the budget. Antithetic draws begin with equal widths: the
        scores of blocks, and of heads and channels, cannot be compared before a loss has been seen."""
        units, spendable = unit_costs(costs, dimensions), self._spendable(costs, dimensions)
        scores = starting_scores(importances, min(1.0, spendable / float(units.sum())))
        if self.baseline != "antithetic":
            return State(0, projected(scores.flat, spendable, units))
        groups, channels = even_widths(costs, dimensions, self.ratio, self.multiple)
        even = Importances(with_one_border(scores.groups, groups), with_one_border(scores.channels, channels))
        return State(0, even.flat)

    def search(self, model: Searched, state: State) -> Iterator[State]:
        """The states of the steps that are left after `state`. RunError: too few losses of a step are finite."""
        every = math.ceil(self.steps / self.checks) if self.checks else self.steps + 1
        if self.checks and state.best is None:
            state = self._judged(model, state)
        while state.step < self.steps:
            state = (self._pairs if self.baseline == "antithetic" else self._independent)(model, state)
            if state.step % every == 0 or (self.checks and state.step == self.steps):
                state = self._judged(model, state)
            yield state

    def decide(self, state: State, costs: Costs, dimensions: Dimensions) -> Structure:
        """What stays: the units of largest score that the budget holds."""
        scores = Importances(*_apart(state.scores if state.best is None else state.best, dimensions))
        return structure_of(*chosen_units(scores, costs, dimensions, self.ratio, self.multiple, self.shape))

    def _pairs(self, model: Searched, state: State) -> State:
        """After a step with antithetic draws, a pair or more for each sample of the batch."""
        samples = model.batch(state.step, self.checks > 0).repeat(self.draws // 2)
        counts = units_of_rows(model.dimensions)
        row_of = torch.arange(len(counts)).repeat_interleave(counts)
        generator, spread = self._generator(state), self.spread * state.shrunk
        by_unit, by_row = spread / counts[row_of].sqrt(), spread / math.sqrt(len(counts))
        own, shared = (torch.randn(len(samples), count, generator=generator) for count in (len(row_of), len(counts)))
        noise = by_unit * own + by_row * shared[:, row_of]
        masks = torch.stack([self._decided(model, state.scores + one) for one in (*noise, *-noise)])
        losses = model.losses(masks, samples.repeat(2)).view(2, -1)
        self._check_losses(state, losses.sum(dim=0), least=1)
        differences = masks[: len(samples)].float() - masks[len(samples) :].float()
        of_units, of_rows = (antithetic_gradient(losses, found) for found in (differences, 2 * shared))
        step = by_unit * of_units + by_row * of_rows[row_of]
        scores = state.scores - self.rate * falling(state.step, self.steps) * step
        return self._after(state, scores, losses.flatten())

    def _independent(self, model: Searched, state: State) -> State:
        """After a step with draws of every unit by itself, each for the whole batch: the authors'."""
        samples = model.batch(state.step, self.checks > 0)
        uniform = torch.rand(self.draws, len(state.scores), generator=self._generator(state))
        masks = uniform < state.scores
        rows = model.losses(masks.repeat_interleave(len(samples), dim=0), samples.repeat(self.draws))
        losses = rows.view(self.draws, -1).mean(dim=1)
        self._check_losses(state, losses, least=2)
        mean = float(losses[losses.isfinite()].mean())
        moving = moving_baseline(state.baseline, mean, self.window) if self.baseline == "moving" else None
        gradient = policy_gradient(losses, masks, state.scores, moving)
        units, spendable = unit_costs(model.costs, model.dimensions), self._spendable(model.costs, model.dimensions)
        rate = self.rate * state.shrunk * falling(state.step, self.steps)
        scores = projected(state.scores - rate * gradient, spendable, units)
        return replace(self._after(state, scores, losses), baseline=moving)

    def _after(self, state: State, scores: Float[Tensor, " unit"], losses: Float[Tensor, " row"]) -> State:
        return replace(state, step=state.step + 1, scores=scores, losses=tuple(losses.tolist()))

    def _generator(self, state: State) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + state.step)

    def _check_losses(self, state: State, losses: Float[Tensor, " draw"], least: int) -> None:
        if int(losses.isfinite().sum()) < least:
            raise RunError(
                f"structure=policy_gradient: the losses of step {state.step} are {losses.tolist()}; load the model in "
                "float32 or bfloat16 (model.dtype) or take more draws a step (structure.draws)"
            )

    def _judged(self, model: Searched, state: State) -> State:
        """After the probe's verdict: a new best where the loss fell, back to the best with smaller steps where it rose;
        on where it did neither by more than the standard error of the difference."""
        mask = self._decided(model, state.scores)
        losses = model.losses(mask.expand(len(model.probe), -1), model.probe)
        if state.best is None:
            self._check_losses(state, losses, least=len(losses))
            return replace(state, best=state.scores, best_losses=tuple(losses.tolist()))
        rise = losses - torch.tensor(state.best_losses, dtype=torch.float64)
        error = float(rise.std()) / math.sqrt(len(rise)) if len(rise) > 1 else 0.0
        if abs(float(rise.mean())) <= error:
            return state
        if float(rise.mean()) < 0:
            return replace(state, best=state.scores, best_losses=tuple(losses.tolist()))
        return replace(state, scores=state.best, shrunk=state.shrunk * SHRINK)

    def _decided(self, model: Searched, scores: Float[Tensor, " unit"]) -> Bool[Tensor, " unit"]:
        apart = Importances(*_apart(scores, model.dimensions))
        units = chosen_units(apart, model.costs, model.dimensions, self.ratio, self.multiple, self.shape)
        return torch.cat([kept.flatten() for kept in units])

    def _spendable(self, costs: Costs, dimensions: Dimensions) -> float:
        """Parameters for units: the budget less what no unit holds."""
        all_units = float(unit_costs(costs, dimensions).sum())
        return kept_parameters(costs, self.ratio) - (costs.total - all_units)


def losses_on(dense: DenseModel) -> LossesOf:
    """Of the model block by block, `batch_size` rows at a time; the ranks share the rows as they do the samples."""
    inputs, head, length = dense.inputs(), dense.head(), dense.input_ids.shape[1]

    @torch.no_grad()
    def losses(masks: Bool[Tensor, "row unit"], samples: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        own = samples % distributed.num_ranks() == distributed.rank()
        places = distributed.own_places(samples)
        states = inputs[places.to(inputs.device)]
        groups, channels = _apart(masks[own], dense.dimensions)
        for place, block in enumerate(dense.blocks()):
            for start in range(0, len(states), dense.batch_size):
                rows = slice(start, start + dense.batch_size)
                with masked(block, groups[rows, place], channels[rows, place], dense.dimensions):
                    block.outputs(states[rows], dense.batch_size, out=states[rows])
        sums = [
            summed_entropies(head, dense.input_ids[place : place + 1], [states[row : row + 1]])
            for row, place in enumerate(places.tolist())
        ]
        found = torch.zeros(len(samples), dtype=torch.float64)
        found[own] = torch.cat([found[:0], *sums]) / (length - 1)
        return distributed.all_sum(found)

    return losses


def unit_costs(costs: Costs, dimensions: Dimensions) -> Float[Tensor, " unit"]:
    """Parameters of each group of all blocks, then of each channel."""
    groups = torch.tensor(costs.groups).repeat_interleave(dimensions.groups)
    channels = torch.tensor(costs.channels).repeat_interleave(dimensions.channels)
    return torch.cat([groups, channels]).float()


def units_of_rows(dimensions: Dimensions) -> Int[Tensor, " row"]:
    """How many units each row has: a block's groups, and then a block's channels."""
    return torch.tensor([dimensions.groups, dimensions.channels]).repeat_interleave(dimensions.blocks)


def _apart(units: Shaped[Tensor, "*row unit"], dimensions: Dimensions) -> list[Tensor]:
    """What is known of all units, as [*row block group] and [*row block channel]."""
    counts = [dimensions.blocks * dimensions.groups, dimensions.blocks * dimensions.channels]
    return [part.unflatten(-1, (dimensions.blocks, -1)) for part in units.split(counts, dim=-1)]
