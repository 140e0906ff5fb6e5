"""Tuning of kept weights: exact budgets, zeros that stay, and never worse on the probe than the start."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from tiny_llama import tiny_llama

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.linears import find_norms
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.observation import observe
from besa_exp.blocks.probe import probe_loss
from besa_exp.blocks.pruner import PrunedBlock, Task
from besa_exp.blocks.reports import Step
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.besa_reconstruct import BesaReconstruct
from besa_exp.methods.pruners.model_tuning import ModelTuning
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.methods.tuning import Ramp, Tuning, downhill, keep_valuable, tune
from besa_exp.methods.updates.dsnot import Dsnot
from besa_exp.methods.updates.obs import Obs
from besa_exp.methods.updates.reconstruct import Reconstruct
from besa_exp.methods.updates.updated import Updated
from besa_exp.tensors.losses import token_errors
from besa_exp.tensors.masks import Goal, keep_per_row
from besa_exp.tensors.statistics import Hessian, InputMoments, InputNorm

INPUT_IDS = torch.randint(0, 258, (16, 24), generator=torch.Generator().manual_seed(1))
DENSE = tiny_llama(context=32).requires_grad_(False)


def first_block():
    model = copy.deepcopy(DENSE)
    blocks = capture_blocks(model, INPUT_IDS)
    inputs = embed(model, blocks, INPUT_IDS, 4)
    return blocks[0], inputs, blocks[0].outputs(inputs, 4)


def uniform_masks(block, sparsity=0.6):
    return {name: keep_per_row(linear.weight.abs(), Goal(sparsity)) for name, linear in block.linears.items()}


def weights_of(block):
    return {name: linear.weight.detach().clone() for name, linear in block.linears.items()}


def after_tuning(*given) -> tuple[PrunedBlock, dict[str, torch.Tensor], float]:
    """What `tune` returns, its weights, and the probe loss where it began."""
    tuned = tune(*given)
    assert tuned.weights is not None
    assert tuned.loss_before is not None
    return tuned, dict(tuned.weights), tuned.loss_before


def reports_of(pruner, sparsity=0.6, pattern="unstructured"):
    model = copy.deepcopy(DENSE)
    blocks = capture_blocks(model, INPUT_IDS)
    inputs = embed(model, blocks, INPUT_IDS, 4)
    return [report for report, _ in prune_blocks(blocks, inputs, pruner, Goal.parse(sparsity, pattern), 4)]


def test_tuning_lowers_the_probe_loss_and_keeps_the_mask() -> None:
    block, inputs, targets = first_block()
    masks = uniform_masks(block)
    tuned, weights, before = after_tuning(
        block, inputs, targets, weights_of(block), masks, Tuning(10, 4, lr=0.1), lambda step: None
    )
    after = probe_loss(block, inputs, targets, weights)
    assert after < 0.95 * before
    assert tuned.steps[-1].loss < 0.5 * tuned.steps[0].loss
    for name, mask in masks.items():
        assert torch.equal(tuned.keep_masks[name], mask)
        assert not weights[name][~mask].any()
        assert weights[name][mask].all()


def test_a_massive_token_counts_as_its_size_in_what_is_learned_and_not_in_what_is_reported() -> None:
    block, inputs, targets = first_block()
    targets = targets.clone()
    targets[:, 0] *= 100
    masks = uniform_masks(block)
    tuned, _weights, before = after_tuning(
        block, inputs, targets, weights_of(block), masks, Tuning(1, batch_size=14, lr=0.01), lambda step: None
    )
    masked = {name: weight * masks[name] for name, weight in weights_of(block).items()}
    errors, sizes = token_errors(block.outputs(inputs, 4, masked), targets).double(), targets.double().norm(dim=-1)
    learned = (errors * sizes).sum(dim=-1) / sizes.sum(dim=-1)
    assert tuned.steps[0].loss == pytest.approx(float(learned[:14].mean()), rel=1e-5)
    assert before == pytest.approx(float(errors[14:].mean()), rel=1e-5)


def test_a_step_size_that_ruins_the_block_leaves_it_as_it_began() -> None:
    block, inputs, targets = first_block()
    masks = uniform_masks(block, 0.1)
    tuning = Tuning(epochs=1, batch_size=4, lr=1.0, checks=1)
    _tuned, weights, _before = after_tuning(block, inputs, targets, weights_of(block), masks, tuning, lambda step: None)
    for name, weight in weights_of(block).items():
        assert torch.equal(weights[name], weight * masks[name])


def test_a_step_size_that_is_too_large_shrinks_until_it_helps() -> None:
    block, inputs, targets = first_block()
    masks = uniform_masks(block, 0.5)

    def loss_after(checks: int) -> float:
        tuning = Tuning(epochs=12, batch_size=4, lr=1.0, checks=checks)
        _tuned, weights, before = after_tuning(
            block, inputs, targets, weights_of(block), masks, tuning, lambda step: None
        )
        return probe_loss(block, inputs, targets, weights) / before

    assert loss_after(checks=1) == pytest.approx(1)
    assert loss_after(checks=12) < 0.9


def test_what_is_tuned_between_two_changes_of_the_mask_is_undone_where_it_does_not_help() -> None:
    block, inputs, targets = first_block()
    ramp = Ramp(0.1, 0.3, until=1.0, every=1)
    losses = []
    for lr in (1.0, 1e-6):  # the one ruins, the other moves next to nothing
        tuning = Tuning(epochs=2, batch_size=4, lr=lr, checks=1)
        _tuned, weights, _before = after_tuning(
            block, inputs, targets, weights_of(block), uniform_masks(block, 0.1), tuning, lambda s: None, ramp
        )
        losses.append(probe_loss(block, inputs, targets, weights))
    assert losses[0] < 1.2 * losses[1]


@pytest.mark.parametrize(("least", "asked"), [(4, 3), (2, 4), (0, 5), (6, 4)])
def test_a_step_size_is_sought_downhill_from_the_middle(least: int, asked: int) -> None:
    sizes, tried = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003), []

    def loss_after(size: float) -> float:
        tried.append(size)
        return abs(sizes.index(size) - least)

    assert downhill(sizes, 0.01, loss_after) == sizes[least]
    assert len(tried) == len(set(tried)) == asked


def test_a_step_size_that_nobody_gave_is_one_that_helps_on_models_of_any_scale() -> None:
    block, inputs, targets = first_block()
    masks = uniform_masks(block, 0.5)
    for found in (Tuning(epochs=4, batch_size=4), Tuning(epochs=4, batch_size=4, lr=1e-4)):
        _tuned, weights, before = after_tuning(
            block, inputs, targets, weights_of(block), masks, found, lambda step: None
        )
        gain = probe_loss(block, inputs, targets, weights) / before
        assert gain < 0.9 if found.lr is None else gain > 0.9


def test_the_block_itself_is_not_changed() -> None:
    block, inputs, targets = first_block()
    before = weights_of(block)
    tune(block, inputs, targets, before, uniform_masks(block), Tuning(epochs=1), lambda step: None)
    for name, weight in weights_of(block).items():
        assert torch.equal(weight, before[name])


def test_the_least_costly_weights_of_the_whole_block_go_and_none_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(5, 7, generator=generator) for name in "ab"}
    squared = {"a": torch.rand(5, 7, generator=generator), "b": 100 * torch.rand(5, 7, generator=generator)}
    masks = {name: torch.rand(5, 7, generator=generator) > 0.2 for name in "ab"}
    kept = keep_valuable(weights, squared, masks, 0.5)
    cost = torch.cat([(weights[name].double() ** 2 * squared[name].double()).flatten() for name in "ab"])
    flat, before = (
        torch.cat([kept[name].flatten() for name in "ab"]),
        torch.cat([masks[name].flatten() for name in "ab"]),
    )
    assert int((~flat).sum()) == 35
    assert not flat[~before].any()
    assert cost[flat].min() >= cost[~flat & before].max()
    assert kept["a"].sum() < kept["b"].sum()  # b's weights cost more


@pytest.mark.parametrize("num_steps", [1, 2, 7, 40, 133])
def test_the_ramp_rises_to_exactly_its_end_and_then_stays(num_steps: int) -> None:
    ramp = Ramp(0.3, 0.7, until=0.6, every=4)
    course = [sparsity for step in range(num_steps) if (sparsity := ramp.sparsity_after(step, num_steps)) is not None]
    assert course == sorted(course)
    assert course[-1] == pytest.approx(0.7, abs=1e-12)
    assert all(ramp.sparsity_after(step, num_steps) is None for step in range(ramp.settles(num_steps) + 1, num_steps))


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.95])
@pytest.mark.parametrize(("begin", "start"), [("besa", 1.0), ("besa", 0.7), ("sparsegpt", 0.7)])
def test_besa_reconstruct_meets_the_budget_of_each_block_exactly(begin: str, start: float, sparsity: float) -> None:
    for report in reports_of(BesaReconstruct(Tuning(epochs=2, batch_size=4, lr=0.01), begin, start), sparsity):
        weights = sum(linear.weights for linear in report.linears)
        assert sum(linear.pruned for linear in report.linears) == round(sparsity * weights)


def test_besa_reconstruct_gives_rows_different_sparsities_and_beats_sparsegpt_on_the_probe() -> None:
    ours = reports_of(BesaReconstruct(Tuning(epochs=10, batch_size=4)), 0.7)
    theirs = reports_of(Updated(SparseGPT(), Reconstruct(Tuning(epochs=10, batch_size=4))), 0.7)
    assert len({linear.pruned / linear.weights for linear in ours[0].linears}) > 1
    plain = reports_of(SparseGPT(), 0.7)
    assert ours[0].loss_after < plain[0].loss_after
    assert theirs[0].loss_after < plain[0].loss_after


def test_besa_reconstruct_and_an_update_of_besa_leave_its_masks_alone_and_number_their_steps_on() -> None:
    tuning, masks = Tuning(epochs=1, batch_size=4), []
    for pruner in (Besa(), BesaReconstruct(tuning), Updated(Besa(), Reconstruct(tuning))):
        model = copy.deepcopy(DENSE)
        blocks = capture_blocks(model, INPUT_IDS)[:1]
        inputs = embed(model, blocks, INPUT_IDS, 4)
        seen = []
        ((report, pruned),) = prune_blocks(blocks, inputs, pruner, Goal(0.6), 4, seen.append)
        masks.append(pruned.keep_masks)
        assert [step.step for step in report.steps] == list(range(len(report.steps)))
        assert tuple(seen) == report.steps
    assert all(torch.equal(mask, other[name]) for other in masks[1:] for name, mask in masks[0].items())


def test_besa_reconstruct_refuses_to_begin_with_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"pruner\.begin=wanda: must be one of besa, sparsegpt"):
        BesaReconstruct(begin="wanda")


def test_tuned_norms_are_refused_where_the_dense_ones_would_come_back() -> None:
    with pytest.raises(ValueError, match=r"pruner\.tuning\.norms=true: .* pruner=besa_reconstruct"):
        BesaReconstruct(Tuning(norms=True), model=ModelTuning())


def test_besa_reconstruct_keeps_an_n_m_pattern() -> None:
    model = copy.deepcopy(DENSE)
    blocks = capture_blocks(model, INPUT_IDS)
    inputs = embed(model, blocks, INPUT_IDS, 4)
    list(prune_blocks(blocks, inputs, BesaReconstruct(Tuning(epochs=1)), Goal.parse(0.5, "2:4"), 4))
    for block in blocks:
        for linear in block.linears.values():
            assert (linear.weight.view(-1, 4) == 0).sum(dim=1).eq(2).all()


def test_the_obs_update_of_sparsegpts_own_mask_is_sparsegpt() -> None:
    block, inputs, targets = first_block()
    statistics, _ = observe(block, inputs, Hessian, 4)
    task = Task(block, inputs, targets, statistics, Goal(0.5))
    pruned = SparseGPT().prune_block(task)
    updated = Obs().update_block(task, pruned)
    assert pruned.weights is not None
    assert updated.weights is not None
    for name, weight in pruned.weights.items():
        torch.testing.assert_close(updated.weights[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pruner", "update", "pattern", "refused"),
    [
        (Uniform(), Obs(), "unstructured", False),
        (SparseGPT(), Reconstruct(), "unstructured", False),
        (SparseGPT(), Dsnot(), "unstructured", True),
        (BesaReconstruct(), Dsnot(), "unstructured", False),
        (BesaReconstruct(), Dsnot(), "2:4", True),
        (BesaReconstruct(begin="sparsegpt"), Dsnot(), "unstructured", True),
    ],
)
def test_an_update_refuses_a_pruner_that_needs_another_statistic(pruner, update, pattern, refused) -> None:
    problems = Updated(pruner, update).check(0.5, pattern)
    assert bool(problems) == refused
    assert all("needs the Hessian of the inputs and not what the update observes" in problem for problem in problems)


def test_best_observes_hessians_where_sparsegpt_chooses_the_mask_alone() -> None:
    asked = Goal(0.5), Goal.parse(0.5, "2:4")
    for update, second in ((None, Hessian), (Obs(), Hessian), (Dsnot(), InputMoments)):
        first = InputNorm if update is None else second
        pruner = BesaReconstruct() if update is None else Updated(BesaReconstruct(), update)
        assert tuple(map(pruner.traits.observed, asked)) == (first, second)


def test_norms_are_tuned_on_request_and_the_probe_chooses_them_with_the_weights() -> None:
    block, inputs, targets = first_block()
    masks, dense = uniform_masks(block), {name: p.clone() for name, p in block.module.named_parameters()}
    tuning = Tuning(epochs=10, batch_size=4, norms=True)
    tuned, weights, before = after_tuning(block, inputs, targets, weights_of(block), masks, tuning, lambda step: None)
    assert set(tuned.norms) == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert not any(torch.equal(norm, dense[path]) for path, norm in tuned.norms.items())
    assert probe_loss(block, inputs, targets, {**weights, **tuned.norms}) < 0.95 * before
    assert all(torch.equal(parameter, dense[name]) for name, parameter in block.module.named_parameters())


def test_a_step_size_that_ruins_the_block_leaves_its_norms_as_they_were() -> None:
    block, inputs, targets = first_block()
    tuning = Tuning(epochs=1, batch_size=4, lr=1.0, checks=1, norms=True)
    tuned, _weights, _before = after_tuning(
        block, inputs, targets, weights_of(block), uniform_masks(block, 0.1), tuning, lambda step: None
    )
    assert all(torch.equal(norm, block.module.get_parameter(path)) for path, norm in tuned.norms.items())


@pytest.mark.parametrize("pruner", [BesaReconstruct, Reconstruct])
def test_tuned_norms_are_written_into_the_block_and_the_reported_loss_is_theirs(pruner) -> None:
    tuning = Tuning(epochs=4, batch_size=4, norms=True)
    chosen = BesaReconstruct(tuning) if pruner is BesaReconstruct else Updated(Uniform(), Reconstruct(tuning))
    model = copy.deepcopy(DENSE)
    blocks = capture_blocks(model, INPUT_IDS)[:1]
    inputs = embed(model, blocks, INPUT_IDS, 4)
    targets = blocks[0].outputs(inputs, 4)
    given = inputs.clone()
    ((report, pruned),) = prune_blocks(blocks, inputs, chosen, Goal(0.6), 4)
    assert len(pruned.norms) == 2
    assert all(torch.equal(norm, blocks[0].module.get_parameter(path)) for path, norm in pruned.norms.items())
    assert report.loss_after == pytest.approx(probe_loss(blocks[0], given, targets, {}), rel=1e-6)


def test_norms_are_found_by_what_they_hold_biases_of_linears_are_not_among_them() -> None:
    module = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(4, 4), "b": torch.nn.LayerNorm(4), "c": torch.nn.Sequential(torch.nn.RMSNorm(4))}
    )
    assert [list(norm) for norm in find_norms(module)] == [["b.weight", "b.bias"], ["c.0.weight"]]


@pytest.mark.parametrize(
    "pruner",
    [
        BesaReconstruct(Tuning(1, 4, lr=0.01), begin="sparsegpt", start=0.5),
        Updated(SparseGPT(group_size=32), Reconstruct(Tuning(1, 4, lr=0.01))),
    ],
)
def test_no_statistic_is_held_while_weights_are_tuned(pruner) -> None:
    model = copy.deepcopy(DENSE)
    blocks = capture_blocks(model, INPUT_IDS)[:1]
    inputs, held = embed(model, blocks, INPUT_IDS, 4), []
    others = {id(found) for found in gc.get_objects() if isinstance(found, Hessian)}  # of other tests

    def on_step(step: Step) -> None:
        held.append(sum(isinstance(found, Hessian) and id(found) not in others for found in gc.get_objects()))

    assert list(prune_blocks(blocks, inputs, pruner, Goal.parse(0.6, "unstructured"), 4, on_step))
    assert held
    assert not any(held)


def test_an_update_that_needs_what_was_observed_has_it_after_a_pruner_that_forgot_it() -> None:
    updated = reports_of(Updated(BesaReconstruct(Tuning(1, 4, lr=0.01)), Obs()))
    assert all(report.loss_before is not None for report in updated)
