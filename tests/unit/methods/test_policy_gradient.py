"""The estimator against exact enumeration, the projection's invariants, the search's budget and its resumption."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neighbours import all_masked
from tiny_llama import tiny_llama

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.head import head_of
from besa_exp.checkpoints.narrowed_model import costs_of_model, dimensions_of_model, narrowed_model
from besa_exp.errors import RunError
from besa_exp.evaluation.perplexity import sum_of_losses
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
from besa_exp.methods.structure.policy_gradient import PolicyGradient, Searched, State, losses_on, unit_costs
from besa_exp.methods.structure.widths import (
    Importances,
    even_widths,
    importances_of,
    kept_parameters,
    proportional,
    random_importances,
)

IDS = torch.randint(0, 256, (6, 12), generator=torch.Generator().manual_seed(2))
SCORES = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
OUTCOMES = [torch.tensor(bits).bool() for bits in itertools.product((0, 1), repeat=3)]
TABLE = dict(
    zip(map(tuple, (mask.tolist() for mask in OUTCOMES)), [3.0, 2.5, 2.7, 1.2, 2.9, 2.0, 1.9, 0.7], strict=True)
)


def probability(mask):
    return float(torch.where(mask, SCORES, 1 - SCORES).prod())


def expected_gradient(baseline_of):
    """E[g] of two draws, over all 64 pairs of masks."""
    total = torch.zeros(3, dtype=torch.float64)
    for pair in itertools.product(OUTCOMES, repeat=2):
        losses = torch.tensor([TABLE[tuple(mask.tolist())] for mask in pair], dtype=torch.float64)
        chance = math.prod(map(probability, pair))
        total += chance * policy_gradient(losses, torch.stack(pair), SCORES, baseline_of(float(losses.mean())))
    return total


def slope():
    """sqrt(s (1 - s)) dE[L]/ds, by the two conditional means of each unit."""
    found = []
    for unit in range(3):
        means = [0.0, 0.0]
        for mask in OUTCOMES:
            kept = int(mask[unit])
            own = float(SCORES[unit] if kept else 1 - SCORES[unit])
            means[kept] += probability(mask) / own * TABLE[tuple(mask.tolist())]
        found.append(means[1] - means[0])
    return torch.tensor(found, dtype=torch.float64) * (SCORES * (1 - SCORES)).sqrt()


def test_leave_one_out_is_unbiased_and_the_moving_baseline_is_1_point_8_times_the_gradient():
    torch.testing.assert_close(expected_gradient(lambda mean: None), slope(), rtol=1e-5, atol=1e-7)
    moving = expected_gradient(lambda mean: moving_baseline(2.2, mean, 5))
    torch.testing.assert_close(moving, 1.8 * slope(), rtol=1e-5, atol=1e-7)
    constant = expected_gradient(lambda mean: 0.0)
    torch.testing.assert_close(constant, 2 * slope(), rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_a_number_is_left_out():
    masks = torch.stack(OUTCOMES[:3])
    losses = torch.tensor([2.0, math.nan, 1.0], dtype=torch.float64)
    two = policy_gradient(losses[[0, 2]], masks[[0, 2]], SCORES)
    torch.testing.assert_close(policy_gradient(losses, masks, SCORES), two / 2)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-0.5, 1.5), min_size=2, max_size=12), st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_projection_meets_its_budget_is_one_shift_and_idempotent(values, share, seed):
    scores = torch.tensor(values, dtype=torch.float64)
    costs = torch.randint(1, 50, (len(values),), generator=torch.Generator().manual_seed(seed)).double()
    budget = share * float(costs.sum())
    found = projected(scores, budget, costs)
    total = float((costs * found).sum())
    assert total <= budget + 1e-6
    inside = (found > 0) & (found < 1)
    shift = float((scores - found)[inside].max()) if inside.any() else None
    if shift is not None:
        torch.testing.assert_close(found, (scores - shift).clamp(0, 1))
    torch.testing.assert_close(projected(found, budget + 1e-6, costs), found)
    before = float((costs * scores.clamp(0, 1)).sum())
    assert total == pytest.approx(min(before, budget), abs=1e-6)
    assert shift is None or (shift == 0) == (before <= budget)


def test_the_rate_falls_along_a_cosine():
    assert [falling(step, 4) for step in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])


@cache
def parts():
    model = tiny_llama(num_hidden_layers=3, seed=5)
    model.requires_grad_(False)
    return model, capture_blocks(model, IDS), costs_of_model(model), dimensions_of_model(model)


def losses(masks, samples):
    """Row by row, of the whole model."""
    model, blocks, _, dimensions = parts()
    found = []
    for mask, sample in zip(masks, samples.tolist(), strict=True):
        units = mask[:6].view(3, 2), mask[6:].view(3, 96)
        with all_masked(blocks, *units, dimensions), torch.no_grad():
            ids = IDS[sample][None]
            found.append(float(sum_of_losses(model(ids, use_cache=False).logits, ids)) / 11)
    return torch.tensor(found, dtype=torch.float64)


def searched(losses_of=losses):
    return Searched(losses_of, *parts()[2:], num_samples=6, batch_size=3)


def start_of(method):
    model, blocks, costs, dimensions = parts()
    kept = even_widths(costs, dimensions, method.ratio)
    found = importances_of(blocks, embed(model, blocks, IDS, 6), dimensions, kept, 6)
    return method.begin(found, costs, dimensions)


@pytest.mark.parametrize("baseline", ["antithetic", "leave_one_out", "moving"])
def test_a_search_is_the_same_after_a_kill_and_another_with_another_seed(baseline):
    method = PolicyGradient(0.2, steps=6, rate=1.0, spread=1.0, draws=4, baseline=baseline, checks=3)
    states = [*method.search(searched(), start_of(method))]
    assert not torch.allclose(states[0].scores, start_of(method).scores, atol=1e-3)
    assert len({state.shrunk for state in states}) > 1 or states[-1].probe_loss < states[0].probe_loss
    for kill in (0, 2, 4):
        again = State.from_dict(json.loads(json.dumps(states[kill].to_dict())))
        resumed = [*method.search(searched(), again)]
        assert [one.to_dict() for one in resumed] == [one.to_dict() for one in states[kill + 1 :]]
    other = [*replace(method, seed=1).search(searched(), start_of(method))]
    assert other[-1].losses != states[-1].losses


def test_independent_draws_keep_the_budget_of_their_probabilities():
    _, _, costs, dimensions = parts()
    method = PolicyGradient(0.2, steps=6, rate=0.1, draws=3, baseline="moving", checks=0)
    units = unit_costs(costs, dimensions)
    spendable = kept_parameters(costs, 0.2) - costs.total + float(units.sum())
    assert float((units * start_of(method).scores).sum()) == pytest.approx(spendable, rel=0.01)
    for state in method.search(searched(), start_of(method)):
        assert float((units * state.scores).sum(dtype=torch.float64)) <= spendable * (1 + 1e-6)


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_antithetic_draws_are_structures_that_may_be_decided_and_each_sample_has_its_own_pair(shape):
    _, _, costs, dimensions = parts()
    seen = []

    def recorded(masks, samples):
        seen.append((masks, samples.tolist()))
        return losses(masks, samples)

    method = PolicyGradient(0.2, steps=1, draws=2, multiple=8, shape=shape, checks=0)
    next(method.search(searched(recorded), start_of(method)))
    ((masks, samples),) = seen
    assert samples == [0, 1, 2, 0, 1, 2]
    assert len({tuple(mask.tolist()) for mask in masks}) == 6
    for mask in masks:
        groups, channels = mask[:6].view(3, 2).sum(1), mask[6:].view(3, 96).sum(1)
        assert not (channels % 8).any()
        assert groups.min() >= 1
        assert len({*channels.tolist()}) == 1 or shape == "uneven"
        left = costs.total - float((~mask * unit_costs(costs, dimensions)).sum())
        assert left <= kept_parameters(costs, 0.2)


def test_samples_come_in_turn_and_those_of_the_probe_only_judge():
    model = searched()
    assert model.probe.tolist() == [5]
    assert [model.batch(step, judged=True).tolist() for step in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
    assert model.batch(1, judged=False).tolist() == [3, 4, 5]


WORTH = torch.randn(6 + 3 * 96, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
SIZES = [2, 2, 2, 96, 96, 96]  # of a block's groups, then of its channels


def recording(seen):
    """A loss of its own for each sample."""

    def losses_of(masks, samples):
        seen.append((masks, samples.tolist()))
        return masks.double() @ WORTH * (samples.double() - 2.5)

    return losses_of


def test_an_antithetic_step_is_the_literal_one():
    """The fourth of ten, with steps that have shrunk: noise by row and unit, pairs of one sample each, and g."""
    method, seen = PolicyGradient(0.2, steps=10, draws=4, rate=0.3, spread=0.5, seed=2, checks=0), []
    start = replace(start_of(method), step=3, shrunk=0.4)
    state = next(method.search(searched(recording(seen)), start))
    ((masks, samples),) = seen
    assert samples == [3, 4, 5] * 4
    generator = torch.Generator().manual_seed(2 * 1_000_003 + 3)
    own, shared = (torch.randn(6, count, generator=generator).double() for count in (294, 6))
    row_of = [row for row, size in enumerate(SIZES) for _ in range(size)]
    spreads = torch.tensor([0.2 / math.sqrt(SIZES[row]) for row in row_of]).double()
    noise = spreads * own + 0.2 / math.sqrt(6) * shared[:, row_of]
    for pair, e in enumerate(noise.float()):
        assert torch.equal(masks[pair], method._decided(searched(), start.scores + e))
        assert torch.equal(masks[pair + 6], method._decided(searched(), start.scores - e))
    d = [float((masks[p].double() - masks[p + 6].double()) @ WORTH) * (samples[p] - 2.5) / 2 for p in range(6)]
    size = math.sqrt(sum(one**2 for one in d) / 6)
    gradient = torch.zeros(294, dtype=torch.float64)
    for pair in range(6):
        x = (masks[pair].double() - masks[pair + 6].double()) / 2
        gradient += d[pair] / size / 6 * (spreads * x + 0.2 / math.sqrt(6) * shared[pair, row_of])
    rate = 0.3 * (1 + math.cos(math.pi * 0.3)) / 2
    torch.testing.assert_close(state.scores.double(), start.scores - rate * gradient, rtol=0, atol=1e-6)


def test_a_step_with_independent_draws_is_the_literal_one():
    method, seen = PolicyGradient(0.2, steps=10, draws=3, rate=0.01, seed=2, baseline="moving", checks=0), []
    start = replace(start_of(method), step=3, shrunk=0.4, baseline=0.5)
    state = next(method.search(searched(recording(seen)), start))
    ((masks, samples),) = seen
    assert samples == [3, 4, 5] * 3
    drawn = torch.rand(3, 294, generator=torch.Generator().manual_seed(2 * 1_000_003 + 3)) < start.scores
    assert torch.equal(masks, drawn.repeat_interleave(3, dim=0))
    of_draws = [float(mask.double() @ WORTH) * (0.5 + 1.5 + 2.5) / 3 for mask in drawn]
    delta = 0.8 * 0.5 + 0.2 * sum(of_draws) / 3
    assert state.baseline == pytest.approx(delta)
    s, gradient = start.scores.double(), torch.zeros(294, dtype=torch.float64)
    for loss, mask in zip(of_draws, drawn, strict=True):
        gradient += (loss - delta) / 2 * (mask.double() - s) / ((s + 1e-7) * (1 - s + 1e-7)).sqrt()
    moved = s - 0.01 * 0.4 * (1 + math.cos(math.pi * 0.3)) / 2 * gradient
    _, _, costs, dimensions = parts()
    units = unit_costs(costs, dimensions)
    spendable = kept_parameters(costs, 0.2) - costs.total + float(units.sum())
    torch.testing.assert_close(state.scores.double(), projected(moved, spendable, units), rtol=0, atol=1e-6)


def test_the_antithetic_gradient_is_a_literal_sum_in_units_of_the_losses_spread():
    differences = torch.tensor([[0.0, -1, 1], [1, 0, -1]])
    found = antithetic_gradient(torch.tensor([[3.0, 1.0], [1.0, 4.0]]), differences)  # d = 1 and -1.5
    size = math.sqrt((1 + 1.5**2) / 2)
    assert found.tolist() == pytest.approx([-1.5 / 4 / size, -1 / 4 / size, 2.5 / 4 / size])
    lost = antithetic_gradient(torch.tensor([[3.0, math.nan], [1.0, 4.0]]), differences)
    assert lost.tolist() == pytest.approx([0, -0.25 / math.sqrt(0.5), 0.25 / math.sqrt(0.5)])
    assert not antithetic_gradient(torch.ones(2, 2), differences).any()


@pytest.mark.parametrize(
    ("hidden", "settings", "least"),
    [
        ("units", {"steps": 40, "rate": 1.0, "spread": 1.0}, 0.2),
        ("rows", {"steps": 60, "rate": 0.4, "shape": "uneven"}, 0.8),
    ],
)
def test_the_antithetic_search_finds_what_is_hidden_in_the_losses(hidden, settings, least):
    """Which channels are worth most; which block's are, by the noise that they share."""
    _, _, costs, dimensions = parts()
    worth = torch.randn(6 + 3 * 96, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    if hidden == "rows":
        worth = torch.tensor([0.0] * 6 + [-1] * 96 + [0] * 96 + [1] * 96, dtype=torch.float64)
    method = PolicyGradient(0.2, checks=4, **settings)
    start = method.begin(random_importances(dimensions, 3), costs, dimensions)
    *_, state = method.search(searched(lambda masks, samples: -masks.double() @ worth), start)
    best = replace(start, scores=worth.float())
    low, found, high = (kept_worth(method.decide(one, costs, dimensions), worth) for one in (start, state, best))
    assert (found - low) / (high - low) > least


def kept_worth(structure, worth):
    channels = worth[6:].view(3, 96)
    return sum(float(channels[block, list(kept)].sum()) for block, kept in enumerate(structure.channels))


def test_what_the_probe_does_not_confirm_is_undone_and_the_start_is_a_candidate():
    method = PolicyGradient(0.2, steps=7, rate=0.5, spread=0.3, checks=4)  # after 2, 4, 6 and 7 steps
    start = start_of(method)

    def worse_and_worse(masks, samples):
        """For the probe, sample 5; the others learn."""
        probed.append(samples.tolist() == [5])
        assert probed[-1] or 5 not in samples
        return torch.full((len(samples),), float(len(probed)), dtype=torch.float64) + masks.double().std(1)

    probed = []
    *_, state = method.search(searched(worse_and_worse), start)
    assert sum(probed) == 5
    assert probed[0]
    assert state.shrunk == pytest.approx(SHRINK**4)
    assert torch.equal(state.scores, start.scores)
    assert method.decide(state, *parts()[2:]) == method.decide(start, *parts()[2:])
    (begun,) = replace(method, steps=1, rate=1e-9).search(searched(), start)
    *_, better = method.search(searched(), start)
    assert better.probe_loss <= begun.probe_loss


def test_steps_fall_with_their_number_and_draws_narrow_with_what_was_undone():
    method = PolicyGradient(0.2, steps=10_000, checks=0)
    start, seen = start_of(method), []

    def noted(masks, samples):
        seen.append(masks)
        return losses(masks, samples)

    second = replace(start, step=1)
    of_many, of_two = (next(replace(method, steps=n).search(searched(), second)).scores for n in (10_000, 2))
    torch.testing.assert_close(of_many - start.scores, 2 * (of_two - start.scores), rtol=1e-3, atol=1e-6)
    for shrunk in (1.0, 1e-9):
        next(method.search(searched(noted), replace(start, shrunk=shrunk)))
    wide, narrow = (len(masks.unique(dim=0)) for masks in seen)
    assert wide > narrow == 1


def test_the_best_that_the_probe_saw_is_decided():
    method = PolicyGradient(0.2)
    start, found = start_of(method), parts()[2:]
    state = replace(start, scores=start.scores.flip(0), best=start.scores)
    assert (
        method.decide(state, *found) == method.decide(start, *found) != method.decide(replace(state, best=None), *found)
    )


def test_within_the_standard_error_nothing_is_a_new_best_or_undone():
    # A fall and a rise by 0.2 in the mean, with an error of 0.46 / 2; then a fall by 0.3 with the same error.
    verdicts = iter([[1.0] * 4, [0.4, 1.2, 0.4, 1.2], [0.8, 1.6, 0.8, 1.6], [0.3, 1.1, 0.3, 1.1]])

    def losses_of(masks, samples):
        found = next(verdicts) if samples.tolist() == [12, 13, 14, 15] else masks.double().std(1).tolist()
        return torch.tensor(found, dtype=torch.float64)

    method = PolicyGradient(0.2, steps=3, rate=0.5, checks=3)
    start = start_of(method)
    *undecided, last = method.search(replace(searched(losses_of), num_samples=16), start)
    for state in undecided:
        assert state.best is not None
        assert torch.equal(state.best, start.scores)
        assert not torch.equal(state.scores, start.scores)
    assert last.shrunk == 1
    assert last.best is last.scores
    assert last.best_losses == (0.3, 1.1, 0.3, 1.1)


def test_a_state_is_read_as_it_was_written():
    state = State(3, torch.rand(50, generator=torch.Generator().manual_seed(3)), 0.1, (1.5, math.inf))
    assert State.from_dict(json.loads(json.dumps(replace(state, best=state.scores / 3).to_dict()))).best is not None
    again = State.from_dict(json.loads(json.dumps(state.to_dict())))
    assert torch.equal(again.scores, state.scores)
    assert (again.step, again.baseline, again.losses[0]) == (3, 0.1, 1.5)
    assert math.isnan(again.losses[1])  # JSON has no infinity
    assert again.best is None


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3])
def test_what_stays_is_just_below_the_budget_and_is_the_masked_model(shape, ratio):
    model, blocks, costs, dimensions = parts()
    method = PolicyGradient(ratio, steps=2, rate=0.1, multiple=8, shape=shape)
    *_, state = method.search(searched(), start_of(method))
    structure = method.decide(state, costs, dimensions)
    left, budget = structure.parameters_left(costs, dimensions), kept_parameters(costs, ratio)
    step = (
        sum(costs.groups) + 8 * sum(costs.channels) if shape == "uniform" else max(*costs.groups, 8 * costs.channels[0])
    )
    assert budget - step < left <= budget
    assert structure.groups is not None
    assert structure.channels is not None
    assert all(len(kept) >= 1 for kept in structure.groups)
    assert all(len(kept) % 8 == 0 for kept in structure.channels)
    assert structure.is_uniform or shape == "uneven"
    masks = torch.zeros(3, 2).bool(), torch.zeros(3, 96).bool()
    for mask, units in zip(masks, (structure.groups, structure.channels), strict=True):
        for block, kept in enumerate(units):
            mask[block, list(kept)] = True
    with all_masked(blocks, *masks, dimensions):
        expected = model(IDS, use_cache=False).logits
    small = narrowed_model(model, structure, uneven=not structure.is_uniform)
    assert small.num_parameters() == left
    torch.testing.assert_close(small(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_antithetic_draws_begin_with_equal_widths_in_the_order_of_the_importances(shape):
    """Whatever the scale of a block's importances, or of heads beside channels, is: where few channels matter little,
    pooled scores would keep both groups."""
    _, _, costs, dimensions = parts()
    found = random_importances(dimensions, 3)
    channels = torch.where(found.channels < 0.05, 0.0, 1 + found.channels)
    scaled = Importances(*(rows * torch.tensor([[1.0], [1e3], [1e-3]]) for rows in (found.groups, channels)))
    method = PolicyGradient(0.2, shape=shape)
    begun = method.decide(method.begin(scaled, costs, dimensions), costs, dimensions)
    even = proportional(scaled, even_widths(costs, dimensions, 0.2))
    assert begun == even or shape == "uneven"
    for one, other in ((begun.groups, even.groups), (begun.channels, even.channels)):
        assert one is not None
        assert other is not None
        assert all({*kept} <= {*more} for kept, more in zip(other, one, strict=True))
        assert sum(map(len, one)) - sum(map(len, other)) <= 3  # what the rest of the budget holds


def test_one_border_keeps_a_rows_order_and_puts_so_many_above_it():
    rows = torch.tensor([[0.1, 0.9, 0.5, 0.4], [30.0, 10.0, 40.0, 20.0]])
    found = with_one_border(rows, 2)
    assert ((found > 0.5) == torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0]], dtype=torch.bool)).all()
    torch.testing.assert_close(found[0], torch.tensor([0.15, 0.95, 0.55, 0.45]))
    assert with_one_border(rows, 4).min(dim=1).values.tolist() == [0.75, 0.75]


def test_without_a_step_the_order_is_that_of_the_start():
    _, _, costs, dimensions = parts()
    importances = random_importances(dimensions, 3)
    method = PolicyGradient(0.25, steps=1, rate=1e-12, shape="uneven")
    begun = method.begin(importances, costs, dimensions)
    (state,) = method.search(searched(lambda masks, samples: torch.ones(len(samples))), begun)
    scores = starting_scores(importances, 0.7)
    kept = method.decide(state, costs, dimensions)
    assert kept.channels is not None
    for block, channels in enumerate(kept.channels):
        order = scores.channels[block].argsort(descending=True, stable=True)[: len(channels)]
        assert sorted(order.tolist()) == [*channels]


@pytest.mark.parametrize("baseline", ["antithetic", "moving"])
def test_losses_that_are_not_finite_end_the_search(baseline):
    method = PolicyGradient(0.2, baseline=baseline)
    with pytest.raises(RunError, match="the losses of step 0 are"):
        next(method.search(searched(lambda masks, samples: torch.full((len(samples),), math.nan)), start_of(method)))


def test_losses_of_rows_are_those_of_the_whole_model():
    model, blocks, costs, dimensions = parts()
    dense = DenseModel(
        lambda: blocks,
        lambda: embed(model, blocks, IDS, 6),
        lambda: head_of(model, blocks, IDS),
        IDS,
        costs,
        dimensions,
        batch_size=2,
    )
    masks = torch.rand(5, 6 + 3 * 96, generator=torch.Generator().manual_seed(1)) < 0.8
    samples = torch.tensor([4, 0, 0, 5, 2])
    torch.testing.assert_close(losses_on(dense)(masks, samples), losses(masks, samples), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"draws": 1}, "structure.draws=1: must be at least 2"),
        ({"draws": 3}, "structure.draws=3: antithetic draws come in pairs"),
        ({"spread": 0.0}, "must be above 0"),
        ({"ratio": 1.2}, "must be above 0 and below 1"),
        ({"baseline": "none"}, "must be one of antithetic, leave_one_out, moving"),
        ({"shape": "even"}, "must be one of uniform, uneven"),
        ({"start": "wanda"}, "must be one of wanda_sp, magnitude, random"),
        ({"rate": 0.0}, "must be above 0"),
    ],
)
def test_bad_settings_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        PolicyGradient(**({"ratio": 0.2} | changes))


def test_importances_of_one_group_a_block_start_at_the_kept_share():
    one = Importances(torch.rand(2, 1), torch.rand(2, 6))
    assert starting_scores(one, 0.7).groups.tolist() == [[pytest.approx(0.7)], [pytest.approx(0.7)]]
