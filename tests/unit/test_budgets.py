"""Budgets over depth: each formula against a literal one in fp64, the total in integers, the loop that obeys."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import tiny_llama

from besa_exp.blocks import capture_blocks, embed
from besa_exp.budgets.alpha import Alpha, hill_exponent
from besa_exp.budgets.budget import exact_targets
from besa_exp.budgets.dlp import Dlp
from besa_exp.budgets.learned import Learned, deal_out
from besa_exp.budgets.owl import Owl
from besa_exp.masks import Target
from besa_exp.pruners.besa import Besa
from besa_exp.pruning import prune_blocks

BUDGETS = {"owl": Owl(), "dlp": Dlp(), "alpha": Alpha(), "learned": Learned()}
INPUT_IDS = torch.randint(0, 258, (8, 24), generator=torch.Generator().manual_seed(1))
DENSE = tiny_llama(context=32).requires_grad_(False)
with torch.no_grad():  # blocks that differ
    for place in range(2):
        DENSE.get_parameter(f"model.layers.{place}.mlp.down_proj.weight")[: 4 * place + 2] *= 20
        DENSE.get_parameter(f"model.layers.{place}.self_attn.q_proj.weight").mul_(1 + place)


def loaded():
    model = copy.deepcopy(DENSE)
    blocks = capture_blocks(model, INPUT_IDS)
    return blocks, embed(model, blocks, INPUT_IDS, 4)


def scores_of_blocks() -> list[torch.Tensor]:
    """|W_ij| ||X_j|| of every block's linears, in fp64, by hooks on a plain forward pass."""
    model, inputs = torch.nn.Module.to(copy.deepcopy(DENSE), torch.float64), {}
    layers = model.get_submodule("model.layers")
    for name, module in layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, output, name=name: inputs.update({name: args[0]}))
    model(INPUT_IDS, use_cache=False)
    blocks: dict[str, list[torch.Tensor]] = {}
    for name, seen in inputs.items():
        norm = (seen.flatten(0, 1).square().sum(dim=0) / len(INPUT_IDS)).sqrt()
        weight = layers.get_parameter(f"{name}.weight")
        blocks.setdefault(name.split(".")[0], []).append((weight.abs() * norm).flatten())
    return [torch.cat(blocks[index]) for index in sorted(blocks)]


def test_owl_is_its_formula() -> None:
    outliers = torch.stack([(score > 5 * score.mean()).double().mean() for score in scores_of_blocks()])
    assert outliers.max() > outliers.min()
    scaled = (outliers - outliers.min()) / (outliers.max() - outliers.min()) * 0.16
    keep = scaled - scaled.mean() + (1 - 0.7)
    torch.testing.assert_close(Owl().sparsities(*loaded(), 0.7, 4), 1 - keep, rtol=1e-3, atol=1e-4)


def test_dlp_is_its_formula() -> None:
    unimportance = torch.stack([1 / score.median() for score in scores_of_blocks()])
    scaled = (unimportance - unimportance.min()) / (unimportance.max() - unimportance.min()) * 0.3
    torch.testing.assert_close(Dlp().sparsities(*loaded(), 0.7, 4), 0.7 + scaled - scaled.mean(), rtol=1e-4, atol=1e-5)


def test_the_hill_exponent_finds_the_exponent_of_a_power_law() -> None:
    """Eigenvalues with density ~ lambda^-alpha from 1 on, by their quantiles."""
    for exponent in (2.0, 3.5):
        quantiles = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
        eigenvalues = (1 - quantiles) ** (-1 / (exponent - 1))
        assert hill_exponent(torch.diag(eigenvalues.sqrt())) == pytest.approx(exponent, rel=0.06)


def test_alpha_prunes_the_block_with_the_larger_exponent_more_and_keeps_the_mean() -> None:
    blocks, inputs = loaded()
    sparsities = Alpha().sparsities(blocks, inputs, 0.6, 4)
    exponents = [
        sum(hill_exponent(linear.weight) for linear in block.linears.values()) / len(block.linears) for block in blocks
    ]
    assert (sparsities[0] < sparsities[1]) == (exponents[0] < exponents[1])
    assert float(sparsities.mean()) == pytest.approx(0.6)
    assert float(sparsities.max() / sparsities.min()) == pytest.approx(1.3 / 0.7)


def test_the_error_of_a_block_is_that_of_the_model_with_this_block_alone_pruned() -> None:
    blocks, inputs = loaded()
    learned = Learned(num_samples=3)
    levels = learned.levels(0.5)
    errors, sizes = learned._errors(blocks, inputs, levels, 4)
    assert sizes.tolist() == [sum(linear.weight.numel() for linear in block.linears.values()) for block in blocks]
    dense = blocks[1](blocks[0](inputs[:3]))
    from besa_exp.pruners.wanda import Wanda

    for index, (place, level) in itertools.product(range(2), enumerate(levels)):
        pruned, states = loaded()
        states = states[:3]
        for number, block in enumerate(pruned):
            if number == index:
                list(prune_blocks([block], states.clone(), Wanda(), Target(level), 4))
            states = block(states)
        expected = (states - dense).square().sum() / dense.square().sum()
        assert float(errors[index, place]) == pytest.approx(float(expected), rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 4)), min_size=2, max_size=3), st.floats(0.42, 0.58))
def test_dealing_out_finds_the_least_sum_of_convex_errors(blocks: list[tuple[float, float]], sparsity: float) -> None:
    levels = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
    errors = torch.tensor([[scale * math.exp(rate * level) for level in levels.tolist()] for scale, rate in blocks])
    sizes = torch.tensor([1.0, 2.0, 3.0][: len(blocks)], dtype=torch.float64)
    found = deal_out(levels, errors, sizes, sparsity)
    assert float((found * sizes).sum()) == pytest.approx(sparsity * float(sizes.sum()), abs=1e-9)

    def cost(sparsities: torch.Tensor) -> float:
        return sum(scale * math.exp(rate * float(s)) for (scale, rate), s in zip(blocks, sparsities, strict=True))

    for one, other in itertools.permutations(range(len(blocks)), 2):  # no exchange between two blocks helps
        moved = found.clone()
        moved[one] += 0.02 / sizes[one]
        moved[other] -= 0.02 / sizes[other]
        if moved.min() >= 0.3 and moved.max() <= 0.7:
            assert cost(moved) >= cost(found) - 1e-6


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5000)), min_size=1, max_size=8), st.floats(0, 0.99))
def test_the_total_is_met_to_the_weight(blocks: list[tuple[float, int]], sparsity: float) -> None:
    weights = [size for _, size in blocks]
    targets = exact_targets(torch.tensor([wish for wish, _ in blocks]), weights, sparsity)
    counts = [target.sparsity * size for target, size in zip(targets, weights, strict=True)]
    assert all(abs(count - round(count)) < 1e-6 for count in counts)
    assert sum(map(round, counts)) == round(sparsity * sum(weights))
    assert all(0 <= target.sparsity <= 1 for target in targets)


@pytest.mark.parametrize("name", BUDGETS)
def test_the_block_loop_gives_each_block_its_target_and_the_model_the_total(name: str) -> None:
    blocks, inputs = loaded()
    before = {name: linear.weight.clone() for name, linear in blocks[0].linears.items()}
    sparsities = BUDGETS[name].sparsities(blocks, inputs.clone(), 0.6, 4)
    assert all(torch.equal(linear.weight, before[name]) for name, linear in blocks[0].linears.items())
    sizes = [sum(linear.weight.numel() for linear in block.linears.values()) for block in blocks]
    targets = exact_targets(sparsities, sizes, 0.6)
    reports = [report for report, _ in prune_blocks(blocks, inputs, Besa(), targets, 4)]
    pruned = [sum(linear.pruned for linear in report.linears) for report in reports]
    assert pruned[0] != pruned[1]
    assert pruned == [round(target.sparsity * size) for target, size in zip(targets, sizes, strict=True)]
    assert sum(pruned) == round(0.6 * sum(sizes))


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_refuses_n_m(name: str) -> None:
    assert BUDGETS[name].check(0.5, "unstructured") == []
    assert f"budget={name}" in BUDGETS[name].check(0.5, "2:4")[0]
