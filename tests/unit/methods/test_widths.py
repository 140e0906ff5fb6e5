"""Importances against literal sums, and the choice of widths against all that there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import tiny
from neighbours import all_masked
from tiny_llama import tiny_llama

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.head import head_of
from besa_exp.checkpoints.narrowed_model import costs_of_model, dimensions_of_model
from besa_exp.checkpoints.structure import Costs, Dimensions
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.structure.method import DenseModel
from besa_exp.methods.structure.widths import (
    Importances,
    Widths,
    carrying_linears,
    chosen_units,
    column_importance,
    even_widths,
    group_importance,
    importances_of,
    kept_parameters,
    masked,
    narrowest,
    proportional,
    random_importances,
    structure_of,
    width_amount_problems,
)

GENERATOR = torch.Generator().manual_seed(7)
DIMENSIONS = Dimensions(blocks=2, hidden=8, groups=3, heads=6, head_dim=2, channels=8)
COSTS = Costs(100, (400, 400), (60, 60), (24, 24))
SCORES = Importances(torch.rand(2, 3, generator=GENERATOR), torch.rand(2, 8, generator=GENERATOR))


def test_importances_are_literal_sums():
    weight, norm = torch.randn(5, 12, generator=GENERATOR), torch.rand(12, generator=GENERATOR)
    columns = column_importance(weight, norm)
    for column in range(12):
        literal = sum(abs(float(weight[row, column])) for row in range(5)) / 5 * float(norm[column]) ** 0.5
        assert float(columns[column]) == pytest.approx(literal, rel=1e-5)
    groups = group_importance(columns, DIMENSIONS)
    for group in range(3):  # two heads of two columns each
        assert float(groups[group]) == pytest.approx(float(columns[4 * group : 4 * group + 4].sum()) / 2, rel=1e-5)
    assert torch.allclose(column_importance(weight), column_importance(weight, torch.ones(12)))


def test_wanda_sp_sees_the_blocks_before_it_masked_and_magnitude_sees_no_inputs():
    model = tiny_llama(num_hidden_layers=2, seed=6)
    model.requires_grad_(False)
    ids = torch.randint(0, 256, (4, 10), generator=GENERATOR)
    blocks, dimensions = capture_blocks(model, ids), dimensions_of_model(model)
    inputs = embed(model, blocks, ids, 4)
    few, all_kept = (importances_of(blocks, inputs.clone(), dimensions, kept, 4) for kept in ((1, 29), (2, 96)))
    assert torch.equal(few.channels[0], all_kept.channels[0])
    assert not torch.allclose(few.channels[1], all_kept.channels[1], rtol=1e-2)
    magnitude = importances_of(blocks, inputs, dimensions, (1, 29), 4, norms=False)
    for block in blocks:
        expected = block.linears["mlp.down_proj"].weight.abs().mean(0)
        torch.testing.assert_close(magnitude.channels[block.index], expected)
    masks = (torch.ones(2, 2).bool(), torch.ones(2, 96).bool())
    before = model(ids).logits
    with all_masked(blocks, *masks, dimensions):
        assert torch.equal(model(ids).logits, before)
    masks[0][1, 0] = False
    with all_masked(blocks, *masks, dimensions):
        assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    assert torch.equal(model(ids).logits, before)


def test_wanda_sp_observes_inputs_from_blocks_that_are_as_narrow_as_they_become():
    """The ratio is of all parameters, embeddings among them, so that a block loses another share of its own units."""
    model = tiny_llama(num_hidden_layers=2, seed=6)
    model.requires_grad_(False)
    ids = torch.randint(0, 256, (4, 10), generator=GENERATOR)
    blocks, dimensions, costs = capture_blocks(model, ids), dimensions_of_model(model), costs_of_model(model)
    inputs = embed(model, blocks, ids, 4)
    head = head_of(model, blocks, ids)
    dense = DenseModel(lambda: blocks, inputs.clone, lambda: head, ids, costs, dimensions, 4)
    found = Widths(0.3).choose(dense, Progress(), lambda told: None)
    assert found.channels is not None
    kept = torch.tensor([found.kept_channels(block, dimensions) for block in (0, 1)])
    assert kept.shape[1] < 0.6 * 96  # which 1 - 0.3 is not
    lost = [channel for channel in range(96) if channel not in kept[0]]
    down = [block.linears["mlp.down_proj"].module for block in blocks]
    seen = []
    narrow = down[0].register_forward_pre_hook(lambda _, args: args[0].index_fill(-1, torch.tensor(lost), 0))
    look = down[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    groups = torch.zeros(2, 2, dtype=torch.bool)
    for block in (0, 1):
        groups[block, list(found.kept_groups(block, dimensions))] = True
    with narrow, look, masked(blocks[0], groups[0], torch.ones(96).bool(), dimensions):
        model(ids)
    norms = seen[0].flatten(0, 1).square().sum(0).div(len(ids)).sqrt()
    importance = blocks[1].linears["mlp.down_proj"].weight.double().abs().mean(0) * norms
    assert importance.argsort(descending=True)[: kept.shape[1]].sort().values.tolist() == kept[1].tolist()


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("multiple", [1, 2])
def test_uniform_widths_are_the_best_pair_of_numbers_that_fits(ratio, multiple):
    found = structure_of(*chosen_units(SCORES, COSTS, DIMENSIONS, ratio, multiple, "uniform"))
    budget, best = kept_parameters(COSTS, ratio), None
    for groups, channels in itertools.product(range(1, 4), range(multiple, 9, multiple)):
        size = 100 + 2 * (400 - 60 * (3 - groups) - 24 * (8 - channels))
        worth = 60 * float(SCORES.groups.sort(descending=True).values[:, :groups].sum())
        worth += 24 * float(SCORES.channels.sort(descending=True).values[:, :channels].sum())
        if size <= budget and (best is None or worth > best[0]):
            best = worth, groups, channels
    assert best is not None
    assert found.groups is not None
    assert found.channels is not None
    assert best[1:] == (len(found.groups[0]), len(found.channels[0]))
    assert found.is_uniform
    assert found.parameters_left(COSTS, DIMENSIONS) <= budget


def test_uneven_widths_go_by_score_and_leave_at_least_one_of_each():
    scores = Importances(torch.tensor([[0.1, 0.9, 0.8], [0.2, 0.15, 0.1]]), SCORES.channels)
    found = structure_of(*chosen_units(scores, COSTS, DIMENSIONS, 0.55, 2, "uneven"))
    assert found.groups is not None
    assert found.channels is not None
    assert found.groups[1] == (0,)  # the only one there though others score more
    assert all(len(kept) % 2 == 0 and kept for kept in found.channels)
    kept = {(block, channel) for block, one in enumerate(found.channels) for channel in one}
    for block, channels in enumerate(found.channels):
        order = scores.channels[block].argsort(descending=True).tolist()
        assert sorted(order[: len(channels)]) == [*channels]
    assert kept
    left = found.parameters_left(COSTS, DIMENSIONS)
    assert kept_parameters(COSTS, 0.55) - 60 < left <= kept_parameters(COSTS, 0.55)


def test_proportional_widths_keep_like_shares_of_heads_and_channels():
    dimensions = Dimensions(blocks=2, hidden=8, groups=8, heads=8, head_dim=2, channels=64)
    costs = Costs(0, (8 * 64 + 64 * 24,) * 2, (64, 64), (24, 24))
    found = proportional(random_importances(dimensions, 1), even_widths(costs, dimensions, 0.25, 4))
    assert found.groups is not None
    assert found.channels is not None
    assert len(found.groups[0]) == 6
    assert len(found.channels[0]) == 48
    assert random_importances(dimensions, 1).flat.tolist() == random_importances(dimensions, 1).flat.tolist()
    assert random_importances(dimensions, 1).flat.tolist() != random_importances(dimensions, 2).flat.tolist()


def test_a_ratio_that_no_width_meets_is_refused_with_the_largest_that_one_does():
    assert narrowest(COSTS, DIMENSIONS, 1) == 100 + 2 * (400 - 120 - 168)
    problems = width_amount_problems(COSTS, DIMENSIONS, 0.8, 1)
    assert (
        "no width meets it: with one group of heads and 1 channels in each block 324 of 900 parameters" in problems[0]
    )
    assert width_amount_problems(COSTS, DIMENSIONS, 0.64, 1) == []
    assert "structure.multiple=9: must be in [1, 8]" in width_amount_problems(COSTS, DIMENSIONS, 0.2, 9)[0]


def test_blocks_without_such_linears_are_refused():
    block = capture_blocks(tiny("mixtral"), torch.ones(1, 4).long())[0]
    with pytest.raises(ValueError, match=r"widths are read off self_attn\.o_proj and mlp\.down_proj or"):
        carrying_linears(block.linears)
    assert costs_of_model(tiny("llama")).total == tiny("llama").num_parameters()


@pytest.mark.parametrize(
    ("parameters", "of_channel", "shape", "expected"),
    [
        (836, 0.4, "uneven", (2, 4)),  # bundles count by their mean
        (786, 0.9, "uneven", (1, 4)),  # no part of a multiple
        (880, 0.9, "uneven", (1, 10)),
        (880, 0.9, "uniform", (1, 10)),
    ],
)
def test_widths_are_multiples_of_channels_or_all(parameters, of_channel, shape, expected):
    """580 parameters in no unit; a group costs 60, a channel 24: 736 with one group and four of the ten channels."""
    costs, dimensions = Costs(0, (1000,), (60,), (24,)), Dimensions(1, 8, 3, 6, 2, 10)
    scores = Importances(torch.full((1, 3), 0.5), torch.full((1, 10), of_channel))
    units = chosen_units(scores, costs, dimensions, 1 - parameters / 1000, 4, shape)
    assert tuple(int(kept.sum()) for kept in units) == expected
