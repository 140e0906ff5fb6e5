"""LLM-Barber: exchanges keep counts, are made where they help, and move no weight."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny
from tiny_llama import tiny_llama
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from besa_exp.blocks.block import Block, capture_blocks, embed
from besa_exp.blocks.observation import observe
from besa_exp.blocks.probe import probe_loss
from besa_exp.blocks.pruner import PrunedBlock, Pruner, Task
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.methods.updates.barber import (
    Barber,
    barber_metric,
    exchanged,
    parts_of,
    squared_gradients,
)
from besa_exp.methods.updates.updated import Update, Updated
from besa_exp.tensors.masks import Goal, floor_of

INPUT_IDS = torch.randint(0, 258, (10, 16), generator=torch.Generator().manual_seed(4))
GENERATOR = torch.Generator().manual_seed(5)
METRICS = {name: torch.rand(6, 8, generator=GENERATOR) for name in "ab"}
MASKS = {name: torch.rand(6, 8, generator=GENERATOR) > 0.5 for name in "ab"}
SETS = {"row": lambda mask: mask.sum(1), "column": lambda mask: mask.sum(0), "linear": lambda mask: mask.sum()}


MAGNITUDE = Uniform("magnitude", "linear")


@cache
def pruned_block(pruner: Pruner, sparsity: float = 0.5, pattern: str = "unstructured") -> tuple[Task, PrunedBlock]:
    model = tiny_llama(seed=3)
    model.requires_grad_(False)
    blocks = capture_blocks(model, INPUT_IDS)
    block, inputs = blocks[0], embed(model, blocks, INPUT_IDS, 10)
    statistics, targets = observe(block, inputs, pruner.traits.statistic, 10, torch.empty_like(inputs))
    task = Task(block, inputs, targets, statistics, Goal.parse(sparsity, pattern))
    return task, pruner.prune_block(task)


def updated(
    method: Barber, pruner: Pruner, pattern: str = "unstructured"
) -> tuple[Block, PrunedBlock, PrunedBlock, float]:
    task, pruned = pruned_block(pruner, 0.5, pattern)
    found = method.update_block(task, pruned)
    masks = found.keep_masks
    given = task.weights if found.weights is None else found.weights
    weights = {name: given[name] * mask for name, mask in masks.items()}
    return task.block, pruned, found, probe_loss(task.block, task.inputs, task.targets, weights)


def test_a_process_whose_samples_all_judge_learns_from_none():
    """The second of two, with one sample: the first learns from its own."""
    task, pruned = pruned_block(MAGNITUDE)
    one = replace(task, inputs=task.inputs[:1], targets=task.targets[:1])
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    found = Barber((0.5,), accept=False).update_block(one, pruned)
    dist.destroy_process_group()
    assert all(torch.equal(mask, pruned.keep_masks[name]) for name, mask in found.keep_masks.items())


@pytest.mark.parametrize("granularity", ["row", "column", "linear", "part"])
def test_each_group_keeps_its_number_of_zeros_and_every_pair_is_worth_it(granularity):
    found = exchanged(METRICS, MASKS, granularity, 0.6)
    came = {name: found[name] & ~MASKS[name] for name in found}
    went = {name: MASKS[name] & ~found[name] for name in found}
    assert all(came[name].any() for name in found)
    if granularity == "part":
        assert sum(mask.sum() for mask in came.values()) == sum(mask.sum() for mask in went.values())
        least = min(METRICS[name][came[name]].min() for name in found)
        assert least > max(METRICS[name][went[name]].max() for name in found)
        return
    for name in found:
        assert torch.equal(SETS[granularity](found[name]), SETS[granularity](MASKS[name]))
    lines = {"row": came["a"], "column": came["a"].T, "linear": came["a"].reshape(1, -1)}[granularity]
    others = {"row": went["a"], "column": went["a"].T, "linear": went["a"].reshape(1, -1)}[granularity]
    metric = {"row": METRICS["a"], "column": METRICS["a"].T, "linear": METRICS["a"].reshape(1, -1)}[granularity]
    for values, up, down in zip(metric, lines, others, strict=True):
        assert not up.any() or values[up].min() > values[down].max()


def test_as_many_pairs_are_exchanged_as_a_literal_count_says():
    """One row: the pruned 9, 7, 2 face the kept 1, 3, 8: two pairs are worth it, of which a half is one."""
    metric, mask = torch.tensor([[9.0, 1, 7, 3, 2, 8]]), torch.tensor([[False, True, False, True, False, True]])
    expected = {0.4: [0, 1, 0, 1, 0, 1], 0.5: [1, 0, 0, 1, 0, 1], 1.0: [1, 0, 1, 0, 0, 1]}
    for ratio, kept in expected.items():
        assert exchanged({"a": metric}, {"a": mask}, "row", ratio)["a"].int().tolist() == [kept]


def test_exchanges_of_any_number_of_pairs_are_counted_exactly():
    pairs = torch.tensor([0, 90, 3_495_263, 2**24 + 3, 41_943_050]).double()
    assert floor_of(pairs * 0.7).tolist() == [0, 63, 2_446_684, 11_744_053, 29_360_135]
    assert floor_of(pairs * 0.3).tolist() == [0, 27, 1_048_578, 5_033_165, 12_582_915]
    assert floor_of(pairs * 1.0).tolist() == pairs.tolist()


def test_ties_and_empty_sides_change_nothing():
    ties, mask = {"a": torch.ones(3, 4)}, {"a": torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()}
    for granularity in ("row", "column", "linear", "part"):
        assert torch.equal(exchanged(ties, mask, granularity, 1.0)["a"], mask["a"])
    some = {"a": torch.arange(12.0).view(3, 4)}
    found = exchanged(some, mask, "row", 1.0)["a"]
    assert torch.equal(found[1:], mask["a"][1:])
    assert found[0].int().tolist() == [0, 0, 1, 1]


def test_two_of_four_holds_after_exchanges():
    metric = torch.rand(5, 16, generator=GENERATOR)
    mask = torch.zeros(5, 16, dtype=torch.bool)
    mask.view(5, 4, 4)[:, :, :2] = True
    found = exchanged({"a": metric}, {"a": mask}, "row", 0.5, group=4)["a"]
    assert found.view(5, 4, 4).sum(-1).eq(2).all()
    assert not torch.equal(found, mask)


def test_squared_gradients_are_means_of_each_samples_own_square():
    """A linear part, y = x W^T: d l / d W = 2 / (tokens out) (W - W_sparse) X^T X, in fp64."""
    dense, inputs = torch.randn(3, 5, generator=GENERATOR), torch.randn(4, 6, 5, generator=GENERATOR)
    sparse = dense * (torch.rand(3, 5, generator=GENERATOR) > 0.5)
    found = squared_gradients(lambda x, w: x @ w["a"].T, {"a": dense}, {"a": sparse}, inputs)["a"]
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for x in inputs.double():
        expected += (2 / 18 * (dense - sparse).double() @ x.T @ x).square() / 4
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)
    given, under = ({"a": one.half()} for one in (dense, sparse))
    half = squared_gradients(lambda x, w: x @ w["a"].T, given, under, inputs.half(), torch.float16)["a"]
    torch.testing.assert_close(half, found, rtol=0.05, atol=0.01 * float(found.max()))
    batched = squared_gradients(lambda x, w: 7 * x @ w["a"].T, {"a": dense}, {"a": sparse}, inputs)["a"]
    torch.testing.assert_close(batched, found * 7.0**4, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("granularity", ["row", "column", "linear", "part"])
def test_the_probe_loss_falls_and_no_zero_is_gained(granularity):
    _, pruned, found, loss = updated(Barber(granularity=granularity), MAGNITUDE)
    assert found.loss_before is not None
    assert loss < found.loss_before
    before, after = (sum(int(mask.sum()) for mask in one.keep_masks.values()) for one in (pruned, found))
    assert before == after
    assert found.weights is None
    if granularity == "row":
        assert all(torch.equal(found.keep_masks[name].sum(1), mask.sum(1)) for name, mask in pruned.keep_masks.items())
    for name, mask in found.keep_masks.items():
        torch.testing.assert_close(found.allocated[name], 1 - mask.float().mean(1))


def test_the_best_of_several_ratios_is_taken_and_a_harmful_one_is_not():
    losses = {ratio: updated(Barber((ratio,), accept=False), MAGNITUDE)[3] for ratio in (0.01, 1.0)}
    _, _, found, best = updated(Barber((0.01, 0.05, 0.2, 1.0)), MAGNITUDE)
    assert found.loss_before is not None
    assert best <= min(*losses.values(), found.loss_before)


def test_an_exchange_under_which_the_probe_loss_rises_is_not_made():
    task, pruned = pruned_block(MAGNITUDE)
    block, inputs = task.block, task.inputs
    weights = {name: linear.weight * pruned.keep_masks[name] for name, linear in block.linears.items()}
    reached = block.outputs(inputs, 10, weights)  # the pruned block's own outputs as targets: nothing can be better
    task = replace(task, targets=reached)
    found = Barber((0.2,)).update_block(task, pruned)
    assert all(torch.equal(found.keep_masks[name], mask) for name, mask in pruned.keep_masks.items())
    forced = Barber((0.2,), accept=False).update_block(task, pruned)
    assert any(not torch.equal(forced.keep_masks[name], mask) for name, mask in pruned.keep_masks.items())


def test_attention_is_rebuilt_before_the_mlp_is_scored():
    task, pruned = pruned_block(MAGNITUDE)
    block, inputs = task.block, task.inputs
    parts = parts_of(block, inputs)
    assert [[name.split(".")[0] for name in names] for _, names in parts] == [["self_attn"] * 4, ["mlp"] * 3]
    _, _, found, _ = updated(Barber((0.3,), accept=False), MAGNITUDE)
    dense = {name: linear.weight for name, linear in block.linears.items()}

    def masks_under(attention):
        weights = {name: dense[name] * attention[name] for name in parts[0][1]}
        mlp = {name: dense[name] for name in parts[1][1]}
        sparse = {name: dense[name] * pruned.keep_masks[name] for name in mlp}
        learned = inputs[: len(inputs) - 1]
        scores = squared_gradients(lambda hidden, own: block(hidden, {**weights, **own}), mlp, sparse, learned)
        metrics = {name: barber_metric(dense[name], score) for name, score in scores.items()}
        return exchanged(metrics, {name: pruned.keep_masks[name] for name in mlp}, "row", 0.3)

    rebuilt, old = masks_under(found.keep_masks), masks_under(pruned.keep_masks)
    assert all(torch.equal(found.keep_masks[name], mask) for name, mask in rebuilt.items())
    assert any(not torch.equal(found.keep_masks[name], mask) for name, mask in old.items())


def test_two_of_four_is_kept_and_other_granularities_are_refused():
    _, _, found, _ = updated(Barber((0.3,), accept=False), MAGNITUDE, "2:4")
    assert all(mask.view(len(mask), -1, 4).sum(-1).eq(2).all() for mask in found.keep_masks.values())
    metric, mask = torch.tensor([[5.0, 7.0, 6.0, 1.0, 2.0, 3.0, 1.0, 1.0]]), torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0]])
    found = exchanged({"a": metric}, {"a": mask.bool()}, "row", 1.0, 4)  # two would come back to a group that keeps one
    assert found["a"].int().tolist() == [[0, 1, 0, 0, 1, 0, 0, 0]]
    assert Barber().check("2:4") == []
    (told,) = Updated(Uniform(), Barber(granularity="part")).check(0.5, "2:4")
    assert "exchanges between rows break N:M" in told


@pytest.mark.parametrize("pattern", ["2:4", "N:8"])
def test_groups_are_those_of_the_order_of_inputs_in_which_they_were_made(pattern):
    """Of every 4 inputs, or of every 8 as many as each row has of its own."""
    size = int(pattern[-1])
    task, pruned = pruned_block(MAGNITUDE, 0.5, "2:4")
    order = {name: torch.randperm(mask.shape[1], generator=GENERATOR) for name, mask in pruned.keep_masks.items()}
    given = {name: torch.zeros_like(mask) for name, mask in pruned.keep_masks.items()}
    for name, mask in given.items():
        kept = torch.arange(len(mask)) % 3 + 1 if size == 8 else torch.full((len(mask),), 2)
        mask[:, order[name]] = torch.arange(mask.shape[1]) % size < kept[:, None]
    task = replace(task, goal=Goal.parse(0.5, pattern))
    pruned = replace(pruned, keep_masks=given, permutations=order)
    found = Barber((0.3,), accept=False).update_block(task, pruned)
    for name, mask in given.items():
        counts = [one[:, order[name]].unflatten(1, (-1, size)).sum(dim=2) for one in (mask, found.keep_masks[name])]
        assert torch.equal(*counts)
        assert not torch.equal(mask, found.keep_masks[name])


def test_an_exchange_in_the_mlp_that_undoes_some_of_what_attention_gained_is_not_made():
    """The targets are what the block puts out once attention has made its exchanges."""
    task, pruned = pruned_block(MAGNITUDE)
    forced = Barber((0.2,), accept=False).update_block(task, pruned).keep_masks
    best = {name: (forced if "attn" in name else pruned.keep_masks)[name] for name in forced}
    weights = {name: linear.weight * best[name] for name, linear in task.block.linears.items()}
    found = Barber((0.2,)).update_block(replace(task, targets=task.block.outputs(task.inputs, 10, weights)), pruned)
    assert all(torch.equal(found.keep_masks[name], mask) for name, mask in best.items())


@pytest.mark.parametrize("retain", [True, False])
def test_gradients_are_at_the_dense_weights_to_what_the_pruner_left_and_sizes_are_of_what_stands(retain):
    task, pruned = pruned_block(SparseGPT(group_size=32))
    assert pruned.weights is not None
    moved = pruned.weights
    (part, names), _ = parts_of(task.block, task.inputs)
    dense = {name: task.block.linears[name].weight.detach() for name in names}
    masks = {name: pruned.keep_masks[name] for name in names}
    learned = task.inputs[: len(task.inputs) - 1]
    scores = squared_gradients(part, dense, {name: moved[name] * masks[name] for name in names}, learned)
    stand = {name: torch.where(masks[name] & retain, moved[name], dense[name]) for name in names}
    expected = exchanged({name: stand[name].abs() * scores[name].sqrt() for name in names}, masks, "row", 0.3)
    found = Barber((0.3,), accept=False, retain=retain).update_block(task, pruned)
    assert all(torch.equal(found.keep_masks[name], mask) for name, mask in expected.items())


def test_weights_that_the_pruner_moved_stay_where_they_stay_kept():
    block, pruned, found, _ = updated(Barber((0.2,), accept=False), SparseGPT(group_size=32))
    _, _, without, _ = updated(Barber((0.2,), accept=False, retain=False), SparseGPT(group_size=32))
    moved = False
    assert found.weights is not None
    assert pruned.weights is not None
    assert without.weights is not None
    for name, mask in found.keep_masks.items():
        both, came = mask & pruned.keep_masks[name], mask & ~pruned.keep_masks[name]
        dense = block.linears[name].weight
        moved |= bool(came.any())
        assert torch.equal(found.weights[name][both], pruned.weights[name][both])
        assert torch.equal(found.weights[name][came], dense[came])
        kept = without.keep_masks[name]
        assert torch.equal(without.weights[name][kept], dense[kept])
    assert moved


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "mixtral"])
def test_families_without_parts_and_with_experts_are_served(family):
    model = tiny(family)
    ids = INPUT_IDS[:6] % 60 + 3
    blocks = capture_blocks(model, ids)
    block, inputs = blocks[0], embed(model, blocks, ids, 6)
    statistics, targets = observe(block, inputs, None, 6, torch.empty_like(inputs))
    task = Task(block, inputs, targets, statistics, Goal(0.5))
    pruned = MAGNITUDE.prune_block(task)
    found = Barber((0.3,), accept=False).update_block(task, pruned)
    assert any(not torch.equal(found.keep_masks[name], mask) for name, mask in pruned.keep_masks.items())
    assert family in FAMILIES or any("experts" in name for name in found.keep_masks)


def test_barber_is_an_update_and_bad_settings_are_refused():
    assert isinstance(Barber(), Update)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"granularity": "block"}, "must be one of row, column, linear, part"),
        ({"ratios": (0.0,)}, "must be above 0 and at most 1"),
        ({"ratios": (0.1, 0.2), "accept": False}, "nothing chooses between several ratios"),
    ]
    for changes, reason in refused:
        with pytest.raises(ValueError, match=reason):
            Barber(**changes)
