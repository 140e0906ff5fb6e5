"""Block influence and the angular run: bounds, invariants, protection, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch
from tiny_llama import tiny_llama

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.checkpoints.narrowed_model import costs_of_model, narrowed_model
from besa_exp.checkpoints.structure import Costs, Dimensions, Structure
from besa_exp.errors import RunError
from besa_exp.methods.structure.shortgpt import (
    Passage,
    ShortGPT,
    amount,
    angular_distance,
    block_influence,
    cosine,
    least_influential,
    least_turning_run,
    passage,
    without,
)

GENERATOR = torch.Generator().manual_seed(6)
DIMENSIONS = Dimensions(6, 8, 2, 4, 2, 16)
COSTS = Costs(100, (50, 50, 50, 50, 50, 50), (0,) * 6, (0,) * 6)


def test_influence_is_between_0_and_2_and_does_not_see_a_tokens_size():
    one, other = torch.randn(2, 5, 8, generator=GENERATOR), torch.randn(2, 5, 8, generator=GENERATOR)
    found = block_influence(one, other)
    expected = 1 - torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-7)
    torch.testing.assert_close(block_influence(3 * one, 5 * other), found, rtol=0, atol=4e-7)
    torch.testing.assert_close(block_influence(one, -one), torch.full((2, 5), 2.0).double())
    torch.testing.assert_close(block_influence(one, one), torch.zeros(2, 5).double(), rtol=0, atol=4e-7)
    assert torch.equal(cosine(one, torch.zeros_like(one)), torch.zeros(2, 5).double())


def test_an_fp16_state_with_a_massive_activation_has_the_influence_that_fp32_gives_it():
    state = torch.randn(1, 1, 64, generator=GENERATOR).half()
    state[..., 3] = 1500
    after = state + torch.tensor(0.25).half()
    assert float(block_influence(state, after)) == pytest.approx(
        float(1 - torch.nn.functional.cosine_similarity(state.double(), after.double(), dim=-1)), abs=2e-7
    )


def test_a_block_that_adds_nothing_has_no_influence_and_its_removal_changes_no_logit():
    model = tiny_llama(num_hidden_layers=3, seed=1)
    model.requires_grad_(False)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.get_parameter(f"model.layers.1.{name}.weight").zero_()
    ids = torch.randint(0, 256, (4, 9), generator=GENERATOR)
    blocks = capture_blocks(model, ids)
    found = passage(blocks, embed(model, blocks, ids, 4), 3)
    structure = without(ShortGPT(blocks=1).removed(found, costs_of_model(model))[0], 3)
    assert structure == Structure((0, 2))
    assert abs(float(found.influence[1])) < 4e-7 < float(found.influence[0])
    assert torch.equal(narrowed_model(model, structure)(ids).logits, model(ids).logits)


def test_the_states_of_the_last_tokens_are_those_of_their_depth_after_the_inputs_are_overwritten():
    model = tiny_llama(num_hidden_layers=3, seed=1)
    model.requires_grad_(False)
    ids = torch.randint(0, 256, (4, 9), generator=GENERATOR)
    blocks = capture_blocks(model, ids)
    inputs = embed(model, blocks, ids, 4)
    found = passage(blocks, inputs.clone(), 3).last_tokens
    states = [inputs]
    for block in blocks:
        states.append(block.outputs(states[-1], 4))
    torch.testing.assert_close(found, torch.stack([state[:, -1] for state in states]), rtol=1e-3, atol=1e-3)


def test_the_angular_run_is_the_one_across_which_the_last_tokens_turn_least():
    """Angles of 0, 60, 70, 75 and 180 degrees: across two blocks the least turn is from 60 to 75."""
    angles = [math.radians(angle) for angle in (0, 60, 70, 75, 180)]
    states = torch.tensor([[[math.cos(angle), math.sin(angle)]] for angle in angles])
    removed, distances = least_turning_run(states, 2)
    assert removed == [1, 2]
    assert distances.tolist() == pytest.approx([70 / 180, 15 / 180, 110 / 180], abs=1e-6)
    assert least_turning_run(states, 2, protected=(1,))[0] == [2, 3]
    found = Passage(torch.rand(4), states)
    costs = Costs(0, (1, 1, 1, 1), (0,) * 4, (0,) * 4)
    assert ShortGPT(blocks=2, metric="angular").removed(found, costs)[0] == [1, 2]
    assert float(angular_distance(states[0], states[4])) == pytest.approx(1, abs=1e-6)


def test_the_earlier_of_equal_blocks_goes_first_and_protected_ones_stay():
    influence = torch.tensor([0.1, 0.3, 0.1, 0.2, 0.05])
    assert least_influential(influence, 3) == [4, 0, 2]
    assert least_influential(influence, 2, protected=[0, 4]) == [2, 3]
    found = Passage(influence, torch.zeros(6, 1, 2))
    method = ShortGPT(blocks=2, protect_first=1, protect_last=1)
    assert method.removed(found, Costs(0, (1,) * 5, (0,) * 5, (0,) * 5))[0] == [2, 3]


@pytest.mark.parametrize("metric", ["influence", "angular"])
def test_states_that_are_not_finite_end_the_choice(metric):
    """Their cosine is no number, and would count as the greatest influence, or as the least turn."""
    states = torch.ones(2, 3, 4)
    states[1, 2, 3] = torch.inf
    found = Passage(torch.tensor([0.1, float(block_influence(states, states).mean()), 0.3]), torch.zeros(4, 1, 2))
    with pytest.raises(RunError, match=r"block 1 are not finite.*model\.dtype"):
        ShortGPT(blocks=1, metric=metric).removed(found, Costs(0, (1,) * 3, (0,) * 3, (0,) * 3))


def test_a_ratio_becomes_the_nearest_number_of_blocks():
    assert [amount(None, ratio, COSTS) for ratio in (0.1, 0.25, 0.3, 0.5)] == [1, 2, 2, 4]
    assert amount(3, None, COSTS) == amount(3, 0.1, COSTS) == 3


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (ShortGPT(ratio=0.05), r"structure\.ratio=0\.05: a single block of the 6 has 12\.5% of the parameters"),
        (ShortGPT(blocks=6), "would remove all 6 blocks; at least one must stay"),
        (
            ShortGPT(blocks=4, protect_first=2, protect_last=1),
            "would remove 4 blocks, and 3 of the 6 are not protected",
        ),
    ],
)
def test_what_cannot_be_removed_is_a_problem_before_anything_is_read(method, reason):
    problems = method.check(COSTS, DIMENSIONS)
    assert len(problems) == 1
    assert re.search(reason, problems[0])
    assert ShortGPT(blocks=3).check(COSTS, DIMENSIONS) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "give one of the two"),
        ({"blocks": 0}, "must be at least 1, as structure=null removes none"),
        ({"ratio": 1.0}, "must be above 0 and below 1"),
        ({"blocks": 1, "metric": "cosine"}, "must be one of influence, angular"),
        ({"blocks": 1, "protect_last": -1}, "must not be negative"),
    ],
)
def test_bad_settings_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        ShortGPT(**changes)
