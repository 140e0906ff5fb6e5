"""SpIEL on a pruned model: its entries stay in the mask, or exchange places with it one for one."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pruned_llama import WINDOWS, Overflowing, assert_same_bits, assert_zeros_exact, pruned_llama, weights_of

from besa_exp.recovery.objective import NextToken
from besa_exp.recovery.schedule import Schedule
from besa_exp.recovery.spiel import Spiel, Tuned, adam_step, ag_exchange, sm3_exchange, sm3_step
from besa_exp.recovery.tuning import Parts, Plan, tune

AG = Spiel(steps=9, lr=5e-3, density=0.05, reselect=4, gather=2)
SM3 = Spiel(steps=9, lr=1e-2, selection="sm3", density=0.05, reselect=4, gather=2)
EXCHANGE = Spiel(steps=9, lr=5e-3, density=0.05, reselect=4, gather=2, exchange=True)


def stepped(method, numbers, dtype=torch.float32, state=None):
    model, keep = pruned_llama(dtype=dtype)
    tuner = method.begin(model, keep, 0)
    if state is not None:
        tuner.load(state)
    for number in numbers:
        step(model, tuner, number)
    return model, keep, tuner


def step(model, tuner, number):
    tuner.step(NextToken(model), WINDOWS[2 * number % 12 :][:2], number, 1.0)


@pytest.mark.parametrize(("dtype", "decay"), [(torch.float32, 0.0), (torch.float32, 10.0), (torch.float16, 0.0)])
def test_the_first_step_is_adams_by_the_gradient_at_the_entries(dtype, decay):
    model, keep = pruned_llama(dtype=dtype)
    plain = copy.deepcopy(model).float().requires_grad_()
    NextToken(plain).differentiate(WINDOWS[:2])
    tuner = replace(AG, decay=decay).begin(model, keep, 0)
    taken = tuner.step(NextToken(model), WINDOWS[:2], 0, 0.5)
    expected, found, deltas = [], [], []
    gathered, sums = [], []
    for name, tuned in tuner.tuned.items():
        gradient = plain.get_parameter(name).grad
        assert gradient is not None
        expected.append(gradient.flatten()[tuned.indices])
        found.append(tuned.moment / 0.1)
        deltas.append(tuned.deltas)
        gathered.append(gradient.flatten()[tuned.candidates])
        sums.append(tuned.sums)
    expected, found, deltas = map(torch.cat, (expected, found, deltas))
    assert float((found - expected).norm()) < 0.02 * float(expected.norm())
    assert float((torch.cat(sums) - torch.cat(gathered)).norm()) < 0.02 * float(torch.cat(gathered).norm())
    assert taken.gradient_norm == pytest.approx(float(expected.norm()), rel=0.02)
    lr = 0.5 * AG.lr
    assert float(deltas.abs().max()) == pytest.approx(lr * (1 - lr * decay), rel=1e-3)
    assert float((deltas * expected).sum()) == pytest.approx(
        -lr * (1 - lr * decay) * float(expected.abs().sum()), rel=0.02
    )


@pytest.mark.parametrize("method", [AG, SM3], ids=["ag", "sm3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_are_unique_and_in_the_mask_their_number_stays_and_zeros_with_it(method, dtype):
    model, keep, tuner = stepped(method, range(7), dtype)
    before = weights_of(pruned_llama(dtype=dtype)[0])
    assert_zeros_exact(model, keep)
    for name, tuned in tuner.tuned.items():
        mask = keep[name].mask().flatten()
        assert mask[tuned.indices].all()
        assert len(tuned.indices.unique()) == len(tuned.indices)
        moved = (model.get_parameter(name) != before[name]).flatten().nonzero()[:, 0]
        assert 0 < len(moved) <= len(tuned.indices)
        assert torch.isin(moved, tuned.indices).all()
    assert tuner.keep.keys() == keep.keys()


@pytest.mark.parametrize("method", [AG, SM3, EXCHANGE], ids=["ag", "sm3", "exchange"])
def test_a_tuner_goes_on_inside_a_phase_of_selection_with_the_same_bits(method):
    """4: one step of the phase is gathered, 5: two, 6: the exchange is done."""
    whole, _, expected = stepped(method, range(4))
    states = {}
    for at in (4, 5, 6):
        assert bool(expected.gathering) == (method.selection == "ag")
        states[at] = {key: value.clone() for key, value in expected.state().items()}
        step(whole, expected, at)
    step(whole, expected, 7)
    for at, state in states.items():
        model, _, again = stepped(method, range(at, 8), state=state)
        assert_same_bits(whole, model)
        for name, value in expected.state().items():
            assert torch.equal(value, again.state()[name]), name


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("method", [AG, SM3, EXCHANGE], ids=["ag", "sm3", "exchange"])
def test_a_step_that_is_not_finite_changes_nothing(method, fault):
    """The second step, after which entries would be exchanged."""
    model, _, tuner = stepped(method, [0])
    state, before = {key: value.clone() for key, value in tuner.state().items()}, weights_of(model)
    taken = tuner.step(Overflowing(model, fault), WINDOWS[2:4], 1, 1.0)
    assert math.isfinite(taken.loss) == (fault != "loss")
    assert math.isfinite(taken.gradient_norm) == (fault != "gradient")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(torch.equal(value, state[key]) for key, value in tuner.state().items())
    tuner.step(NextToken(model), WINDOWS[2:4], 1, 1.0)  # nothing of it is left
    expected = stepped(method, range(2))[2].state()
    assert all(torch.equal(value, expected[key]) for key, value in tuner.state().items())


def test_where_fewer_places_are_free_than_entries_go_as_many_come_by_accumulators():
    tuned = Tuned.at(torch.tensor([0, 1, 4, 5]), torch.zeros(2, 3))
    tuned.rows, tuned.columns = torch.tensor([2.0, 1.0]), torch.tensor([3.0, 1.0, 2.0])
    slots, coming = sm3_exchange(tuned, torch.tensor([3, 0, 1, 2]), None)
    assert (slots.tolist(), coming.tolist()) == ([3, 0], [2, 3])  # of r_i c_j 4 and 3


def test_exchanged_zeros_are_as_many_and_lie_elsewhere():
    model, keep, tuner = stepped(EXCHANGE, range(3))
    came = 0
    for name, bits in tuner.keep.items():
        mask, before = bits.mask(), keep[name].mask()
        assert bits.count == keep[name].count
        came += int((mask & ~before).sum())
        pruned = model.get_parameter(name)[~mask]
        assert not pruned.any()
        assert not torch.signbit(pruned).any()
        tuned = tuner.tuned[name]
        assert mask.flatten()[tuned.indices].all()
        assert torch.isin((mask & ~before).flatten().nonzero()[:, 0], tuned.indices).all()
    assert came > 10
    _, _, later = stepped(EXCHANGE, range(9))
    assert {name: bits.count for name, bits in later.keep.items()} == {name: bits.count for name, bits in keep.items()}


def test_what_was_pruned_and_came_back_began_at_zero_for_a_run_that_goes_on_too():
    often = replace(EXCHANGE, steps=99, lr=5e-2, reselect=3, gather=1, first=1.0)
    whole, _, tuner = stepped(often, range(20))
    model, _, _ = stepped(often, [], state={key: value.clone() for key, value in tuner.state().items()})
    assert_same_bits(whole, model)


def test_nothing_is_exchanged_after_the_last_step():
    """What comes begins at 0."""
    _, _, tuner = stepped(replace(AG, steps=2), range(2))
    assert all(tuned.deltas.all() for tuned in tuner.tuned.values())


def test_of_what_goes_the_smallest_weights_are_pruned_for_what_comes_from_outside_the_mask():
    _, keep, tuner = stepped(EXCHANGE, [])
    name, tuned = next(iter(tuner.tuned.items()))
    mask = keep[name].mask().flatten()
    free = mask.scatter(0, tuned.indices, value=False)
    slots, coming = torch.tensor([5, 1, 7, 3]), torch.cat([(~mask).nonzero()[:2, 0], free.nonzero()[:2, 0]])
    ordered, stays = tuner._move_zeros(name, slots, coming)
    least = slots[tuned.base[slots].abs().argsort()[:2]]
    assert stays.tolist() == [False, False, True, True]
    assert set(ordered[:2].tolist()) == set(least.tolist())
    gone = mask & ~tuner.keep[name].mask().flatten()
    assert set(gone.nonzero()[:, 0].tolist()) == set(tuned.indices[least].tolist())


def test_entries_are_drawn_by_seed_and_linear():
    model, _ = pruned_llama(pruned=0)
    tuners = [AG.begin(model, {}, seed) for seed in (0, 1)]
    first, second = (f"model.layers.{number}.self_attn.q_proj.weight" for number in (0, 1))
    drawn = [tuners[0].tuned[first], tuners[0].tuned[second], tuners[1].tuned[first]]
    assert len({tuple(tuned.indices.tolist()) for tuned in drawn}) == 3


def test_a_weight_is_rounded_once():
    """1 + 2^-8 + 2^-17 is nearer to 1 + 2^-7; a delta that is rounded by itself would leave a tie that goes to 1."""
    _, _, tuner = stepped(AG, [], torch.bfloat16)
    name, tuned = next(iter(tuner.tuned.items()))
    tuned.base.fill_(1.0)
    tuned.deltas.fill_(2**-8 + 2**-17)
    tuner._write(name)
    assert set(tuner.parameters[name].flatten()[tuned.indices].tolist()) == {1 + 2**-7}


def test_no_negative_zero_is_written():
    _, _, tuner = stepped(AG, [])
    name, tuned = next(iter(tuner.tuned.items()))
    tuned.base.fill_(-0.0)
    tuned.deltas.fill_(-0.0)
    tuner._write(name)
    assert not torch.signbit(tuner.parameters[name].flatten()[tuned.indices]).any()


def test_the_loop_ends_with_the_mask_of_its_best_weights(tmp_path):
    model, keep = pruned_llama()
    plan = Plan(Schedule(9), batch_size=6, judge_every=3)
    report, kept = tune(model, keep, EXCHANGE, NextToken(model), Parts(WINDOWS[:6], WINDOWS[:6]), plan)
    assert report.best_step > 0
    for name, bits in kept.items():
        assert not model.get_parameter(name)[~bits.mask()].any()
        assert bits.count == keep[name].count
    assert any(not torch.equal(bits.bits, keep[name].bits) for name, bits in kept.items())


def test_kept_entries_keep_their_delta_and_moments_and_new_ones_have_none():
    indices, candidates = torch.tensor([2, 5, 7, 9]), torch.tensor([5, 1, 9, 3])
    going = torch.tensor([0, 1])
    slots, coming = ag_exchange(indices, going, candidates, torch.tensor([4.0, -3.0, 9.0, 1.0]))
    # 9 is tuned and stays; of 5, 1, 3 the two largest are 5, which goes and comes at once, and 1.
    assert (slots.tolist(), coming.tolist()) == ([0], [1])
    slots, coming = ag_exchange(indices, going, candidates, torch.tensor([0.5, -3.0, 9.0, 1.0]))
    assert (slots.tolist(), coming.tolist()) == ([0, 1], [1, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_age_advances_and_equal_gradients_move_by_the_step_size(dtype):
    """With the authors' age of the state's dtype five steps in bf16 come to 0.00748."""
    tuned = Tuned.at(torch.tensor([0, 3]), torch.zeros(2, 2, dtype=dtype))
    for _ in range(5):
        adam_step(tuned, torch.ones(2), 1e-3)
    torch.testing.assert_close(tuned.deltas, torch.full((2,), -0.005), rtol=1e-4, atol=0)
    assert tuned.age.tolist() == [6, 6]
    assert not tuned.age.is_floating_point()


def test_sm3_bounds_adagrad_from_above():
    """v of an entry is at least the sum of its own squared gradients; accumulators are those of rows and columns."""
    generator = torch.Generator().manual_seed(1)
    tuned = Tuned.at(torch.arange(6), torch.zeros(2, 3))
    total = torch.zeros(6, dtype=torch.float64)
    for _ in range(4):
        gradient = torch.randn(6, generator=generator)
        before = tuned.deltas.clone()
        v = torch.minimum(tuned.rows.repeat_interleave(3), tuned.columns.repeat(2)) + gradient.square()
        sm3_step(tuned, gradient, 0.1)
        total += gradient.double().square()
        assert (v.double() >= total - 1e-6).all()
        torch.testing.assert_close(tuned.rows, v.view(2, 3).amax(dim=1))
        torch.testing.assert_close(tuned.columns, v.view(2, 3).amax(dim=0))
        torch.testing.assert_close(tuned.deltas, before - 0.1 * gradient / (v + 1e-8).sqrt())


def test_settings_that_cannot_be_are_refused():
    faults: list[dict[str, Any]] = [
        {"selection": "rigl"},
        {"density": 1.0},
        {"reselect": 4, "gather": 3},
        {"gather": 0},
    ]
    for fault in faults:
        with pytest.raises(ValueError, match=r"recovery\."):
            Spiel(steps=9, **fault)
    with pytest.raises(ValueError, match=r"recovery\.exchange=true"):
        Spiel(steps=9, selection="sm3", exchange=True)
