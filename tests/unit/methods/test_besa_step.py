"""One step of BESA: its gradient is that of the soft cut, in whatever way it is computed; and the descent."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from families import tiny
from torch import nn
from torch.utils._pytree import tree_map_only

from besa_exp.blocks.block import capture_blocks, embed, samples_at
from besa_exp.blocks.course import Course
from besa_exp.errors import RunError
from besa_exp.methods.allocation import Rows, project_to_budget, shift_by_narrowing
from besa_exp.methods.cuts import Buffers, count_gradient, cut_block
from besa_exp.methods.descent import SHRINK, descend
from besa_exp.methods.n_of_m import Alike, round_to_worth, rows_of_groups
from besa_exp.methods.pruners.besa import besa_step
from besa_exp.tensors.quantisation import Quantiser, quantise, rounded

INPUT_IDS = torch.randint(1, 64, (3, 24), generator=torch.Generator().manual_seed(3))
WINDOW = 0.37  # of no row's weights and no group's is it a whole number: no rank lies at the window's ends


class Subclass(nn.Linear):
    """As far as anyone can tell it computes something else."""


def drawn(dtype=torch.float64, plain=True):
    """A block, its inputs and dense outputs, and weights whose ranks are those of their magnitudes."""
    torch.manual_seed(0)
    model = tiny("llama").to(dtype).requires_grad_(False)
    block = capture_blocks(model, INPUT_IDS)[0]
    for linear in block.linears.values():
        linear.module.__class__ = nn.Linear if plain else Subclass
    inputs = embed(model, [block], INPUT_IDS, 3)
    return block, inputs, block.outputs(inputs, 3), {n: linear.weight.detach() for n, linear in block.linears.items()}


def rows_of(weights, granularity="row", group=None):
    make = Rows.of if group is None else partial(rows_of_groups, group=group)
    return make(weights, lambda name: weights[name].float().abs(), granularity)


def at(rows, sparsity=0.43):
    """A state that meets its budget, every row's sparsity its own."""
    wanted = sparsity + 0.2 * torch.rand(len(rows.capacity), generator=torch.Generator().manual_seed(5)).double()
    total = round(0.5 * rows.num_weights)
    return project_to_budget(wanted, rows.capacity, total), total


def literal_loss(outputs, targets):
    """mean_t ||Y_t - Yhat_t||^2 / ||Y_t||^2 in fp64."""
    return ((targets - outputs).square().sum(-1) / targets.square().sum(-1)).mean()


def soft_keep(rank, cut, window):
    """A cut that is not hard: the share of a weight that is kept falls from 1 to 0 over the window around it."""
    return ((rank - cut[:, None]) / window + 0.5).clamp(0, 1)


@pytest.mark.parametrize("granularity", ["row", "linear"])
@pytest.mark.parametrize("group", [None, 8])
def test_the_whole_step_is_the_finite_difference_of_the_soft_cut_along_the_budget(granularity, group):
    """Straight through: hard masks, moved by as much as the soft cut moves. In fp64, but for the step's loss."""
    block, inputs, targets, weights = drawn()
    rows = rows_of(weights, granularity, group)
    sparsity, total = at(rows)
    _, (gradient,) = besa_step(block, inputs, targets, rows, sparsity, total, WINDOW, Buffers.like(weights))
    counts = rows.counts(sparsity, total)

    def loss(moved):
        by_row = rows.by_linear(moved[rows.cell])
        masked = {}
        for name, weight in weights.items():
            levels, rank = rows.num_levels(name), rows.ranks[name].double()
            window = max(WINDOW * levels, rows.narrowest)
            cut = counts[name].double()
            soft = soft_keep(rank, cut + levels * by_row[name], window) - soft_keep(rank, cut, window)
            inside = window / ((cut + window / 2).clamp(max=levels) - (cut - window / 2).clamp(min=0))  # at a row's end
            masked[name] = weight * ((rank >= cut[:, None]) + soft * inside[:, None])
        return float(literal_loss(block(inputs, masked), targets))

    assert abs(float(gradient.sum())) < 1e-6 * float(gradient.abs().sum())
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        direction = torch.randn(len(rows.capacity), generator=generator).double()
        direction -= (direction * rows.capacity).sum() / rows.capacity.sum()  # sum(n s) stays
        step = 1e-4 * direction
        expected = (loss(step) - loss(-step)) / 2e-4
        assert float(gradient @ direction) == pytest.approx(expected, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("plain", [True, False])
def test_every_way_to_compute_the_step_gives_what_the_gradient_to_the_weights_gives(plain, group):
    """On a CPU plain linears are counted and others masked by autograd; the literal way forms dL/dW of all."""
    block, inputs, targets, weights = drawn(torch.float32, plain)
    rows = rows_of(weights, group=group)
    sparsity, total = at(rows)
    counts = rows.counts(sparsity, total)
    leaves = {name: (weight * mask).requires_grad_() for name, weight, mask in zipped(rows, counts)}
    loss = literal_loss(block(inputs, leaves), targets)
    by_weight = torch.autograd.grad(loss, [*leaves.values()])
    by_count = [
        count_gradient(
            weights[name], found, rows.ranks[name], counts[name], max(WINDOW * levels, rows.narrowest), levels
        )
        for name, found in zip(leaves, by_weight, strict=True)
        for levels in [rows.num_levels(name)]
    ]
    by_row = rows.levels * torch.cat(by_count).double()
    expected = by_row - rows.capacity * by_row.sum() / rows.capacity.sum()
    found_loss, (found,) = besa_step(block, inputs, targets, rows, sparsity, total, WINDOW, Buffers.like(weights))
    assert float(found_loss) == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def zipped(rows, counts):
    return zip(rows.weights, rows.weights.values(), rows.keep_masks(counts).values(), strict=True)


def test_weights_that_are_learned_get_the_gradient_of_what_is_kept_of_them():
    """Rounded weights under clipping, as in joint compression: the mask lets through what is kept."""
    block, inputs, targets, weights = drawn(torch.float32)
    quantiser, rows = Quantiser(3), rows_of(weights)
    sparsity, total = at(rows)
    logits = {name: quantiser.logits(weight, 0.9).requires_grad_() for name, weight in weights.items()}
    effective = {name: rounded(weight, quantiser, logits[name]) for name, weight in weights.items()}
    moved = Rows(effective, rows.ranks, rows.columns, rows.cell, rows.capacity)
    room, also = Buffers.like(weights), [*logits.values()]
    _, (by_sparsity, *by_logits) = besa_step(block, inputs, targets, moved, sparsity, total, WINDOW, room, also=also)
    masks = rows.keep_masks(rows.counts(sparsity, total))
    fresh = {name: value.detach().requires_grad_() for name, value in logits.items()}
    masked = {name: rounded(weights[name], quantiser, fresh[name]) * masks[name] for name in weights}
    expected = torch.autograd.grad(literal_loss(block(inputs, masked), targets), [*fresh.values()])
    for found, own in zip(by_logits, expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-6)
    assert float(by_sparsity.abs().max()) > 0
    fixed = {name: quantise(weights[name], quantiser, logits[name].detach()) for name in weights}
    still = Rows(fixed, rows.ranks, rows.columns, rows.cell, rows.capacity)
    _, (counted,) = besa_step(block, inputs, targets, still, sparsity, total, WINDOW, room)
    torch.testing.assert_close(by_sparsity, counted, rtol=1e-3, atol=1e-5 * float(counted.abs().max()))


def test_a_rank_without_samples_adds_nothing():
    block, inputs, targets, weights = drawn(torch.float32)
    rows = rows_of(weights)
    sparsity, total = at(rows)
    room = Buffers.like(weights)

    def loss_of(outputs, targets):
        return outputs.sum() + 1.0

    loss, (gradient,) = besa_step(block, inputs[:0], targets[:0], rows, sparsity, total, WINDOW, room, loss_of)
    assert loss == 1
    assert not gradient.any()


def test_buffers_hold_the_masked_weights_of_the_last_call_alone():
    block, inputs, _, weights = drawn(torch.float32)
    rows, room = rows_of(weights), Buffers.like(weights)
    for buffer in room.masked.values():
        buffer.fill_(float("nan"))
    for sparsity in (0.3, 0.6):
        counts = rows.counts(torch.full_like(rows.capacity, sparsity), round(sparsity * rows.num_weights))
        outputs, _ = cut_block(block, inputs, rows, counts, WINDOW, room)
        masked = {name: weight * mask for name, weight, mask in zipped(rows, counts)}
        torch.testing.assert_close(outputs, block(inputs, masked), rtol=1e-5, atol=1e-5)


def test_descent_ends_at_the_best_state_that_the_judge_saw_and_projects_after_every_step():
    """Towards 1 by the gradient, but the judge is nearest at 0.3: what goes too far is undone."""
    place, projected, seen = torch.zeros(1), [], []

    def judge():
        seen.append(float(place))
        return abs(float(place) - 0.3)

    started = descend(
        [(place, 0.1)],
        iter([torch.tensor([0])] * 100),
        num_steps=20,
        checks=10,
        gradient=lambda samples, step, best: [place - 1],
        project=lambda: projected.append(place.clamp_(0, 1).item()),
        judge=judge,
    )
    assert started == pytest.approx(0.3)
    assert len(projected) == 20
    assert len(seen) == 11
    assert float(place) == min(seen, key=lambda value: abs(value - 0.3))
    assert max(seen) > 0.31


def test_descent_begins_again_at_the_best_with_smaller_steps_each_time_that_nothing_was_gained():
    """Adam's first moment is 0 then, its second one and its count of steps go on."""
    place, seen = torch.zeros(1), []
    descend(
        [(place, 0.1)],
        iter([torch.tensor([0])] * 100),
        num_steps=20,
        checks=10,
        gradient=lambda samples, step, best: [torch.tensor([-1.0])],
        project=lambda: None,
        judge=lambda: seen.append(place.item()) or 1.0,
    )
    assert place.item() == 0
    expected = [0.0]
    for check in range(10):
        moment, reached = 0.0, 0.0
        for number in (2 * check, 2 * check + 1):
            moment = 0.8 * moment + 0.2
            rate = 0.1 * SHRINK**check * (1 + math.cos(math.pi * number / 20)) / 2
            reached += rate * moment / (1 - 0.8 ** (number + 1))
        expected.append(reached)
    assert seen == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("granularity", ["row", "linear"])
def test_cells_have_the_sums_of_their_rows_and_a_row_that_is_one_its_own_number(granularity):
    rows = rows_of(drawn()[3], granularity)
    values = torch.rand(len(rows.columns), dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    expected = torch.stack([values[rows.cell == cell].sum() for cell in range(len(rows.capacity))])
    torch.testing.assert_close(rows.per_cell(values), expected, rtol=1e-14, atol=0)
    assert (rows.per_cell(values) is values) == (granularity == "row")


def on_meta(values):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), values)


@pytest.mark.parametrize("group", [None, 4])
def test_a_step_and_its_projection_read_no_number_that_they_compute(group, monkeypatch):
    """On the meta device every host read of a value fails: what a GPU's queue would wait for. The cuts are those of a
    GPU; a gradient in fp16 is scaled too."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which meta does not know
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    block, inputs, _, weights = drawn(torch.float16)
    arguments = on_meta(block.arguments(1))
    block = replace(block, module=block.module.to("meta"), arguments=lambda samples: arguments)
    rows = rows_of(weights, group=group)
    if group:
        kinds = tuple(Alike(**on_meta(vars(kind))) for kind in rows.rounded.args[0])
        assert len(kinds) == 2
        rows = replace(rows, rounded=partial(round_to_worth, kinds))
    rows = replace(rows, **{name: on_meta(getattr(rows, name)) for name in ("weights", "ranks", "columns", "cell")})
    rows = replace(rows, capacity=on_meta(rows.capacity))
    sparsity, sample = torch.empty_like(rows.capacity), on_meta(inputs)[torch.zeros(1, dtype=torch.long, device="meta")]
    projected = []

    def gradient(samples, number, best_loss):
        return besa_step(block, sample, sample, rows, sparsity, 900, WINDOW, Buffers.like(rows.weights))[1]

    def project():
        projected.append(project_to_budget(sparsity, rows.capacity, 900))
        sparsity.copy_(projected[-1])

    descend([(sparsity, 0.05)], iter([torch.tensor([0])] * 9), 2, 1, gradient, project, judge=lambda: 0.0)
    assert [found.shape for found in projected] == [sparsity.shape] * 2
    with pytest.raises(RuntimeError, match="meta"):
        float(projected[0].sum())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("wanted", ["spread", "two values", "beyond both ends", "one cell"])
def test_the_shift_that_is_narrowed_down_to_is_the_one_that_sorting_finds(share, wanted):
    generator = torch.Generator().manual_seed(2)
    cells = 1 if wanted == "one cell" else 300
    spread = torch.rand(cells, generator=generator, dtype=torch.float64)
    sparsity = {"two values": 0.45 + 0.1 * spread.round(), "beyond both ends": 5 * spread - 2}.get(wanted, spread)
    capacity = torch.randint(1, 30000, (cells,), generator=generator).double()
    total = round(share * float(capacity.sum()))
    shift = shift_by_narrowing(sparsity, capacity, total)
    found = (sparsity - shift).clamp(0, 1)
    torch.testing.assert_close(found, project_to_budget(sparsity, capacity, total), rtol=0, atol=1e-9)
    assert float((found * capacity).sum()) == pytest.approx(total, abs=1e-3)


def test_a_course_tells_of_steps_in_order_and_names_the_one_that_is_not_finite():
    told = []
    course = Course(drawn()[0], told.append)
    for number in range(3):
        course.add(torch.tensor(0.5 * number), 0.25, torch.ones(2), torch.tensor(0.1 * number), 0.4 * number)
    course.wait()
    assert told == course.steps
    assert [(step.step, step.loss, step.expected_sparsity) for step in told] == [
        (0, 0, 0.25),
        (1, 0.5, 0.25),
        (2, 1, 0.25),
    ]
    assert told[2].penalty == 0.8
    with pytest.raises(RunError, match=r"layers\.0: the gradient is nan at step 3"):
        course.add(torch.tensor(1.0), 0.25, torch.tensor([1.0, torch.nan]))
    with pytest.raises(RunError, match=r"layers\.0: the loss is inf at step 4"):
        course.add(torch.tensor(torch.inf), 0.25)


@pytest.mark.parametrize("places", [[2], [3, 0, 2], []])
def test_the_samples_of_a_step_are_taken_by_places_that_the_host_knows(places):
    states, places = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(places).long()
    assert torch.equal(samples_at(states, places), states[places])
    assert samples_at(states.to("meta"), places).shape == states[places].shape
