"""Budgets over depth: each formula against a literal one in fp64, the total in integers, the loop that obeys."""

from __future__ import annotations

import copy
import itertools
import math
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import tiny_llama
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.head import head_of
from besa_exp.blocks.loop import prune_blocks
from besa_exp.errors import RunError
from besa_exp.methods.budgets.alpha import Alpha, hill_exponent
from besa_exp.methods.budgets.atp import Atp
from besa_exp.methods.budgets.budget import Budget, exact_goals
from besa_exp.methods.budgets.dlp import Dlp
from besa_exp.methods.budgets.evopress import EvoPress, Levels, Space
from besa_exp.methods.budgets.learned import Learned, deal_out
from besa_exp.methods.budgets.owl import Owl
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.budgets.trial import DepthSearch, Trial, check_budget
from besa_exp.methods.budgets.uniform import SameForAll
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.besa_reconstruct import BesaReconstruct
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.methods.tuning import Tuning
from besa_exp.methods.updates.admm import Admm
from besa_exp.methods.updates.updated import Updated
from besa_exp.tensors.masks import Goal

BUDGETS = {
    "owl": Owl(),
    "dlp": Dlp(),
    "alpha": Alpha(),
    "atp": Atp(),
    "learned": Learned(),
    "evopress": EvoPress(generations=4, tokens=(24, 192)),
}
PRUNERS = {
    "magnitude": Uniform("magnitude", "linear"),
    "wanda": Uniform(),
    "ria": Uniform("ria"),
    "wanda+admm": Updated(Uniform(), Admm()),
    "sparsegpt": SparseGPT(group_size=32),
    "besa": Besa(checks=2),
    "best": BesaReconstruct(Tuning(epochs=1, batch_size=4, lr=0.01), group_size=32),
}
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


def trial() -> Trial:
    model = copy.deepcopy(DENSE)
    blocks = capture_blocks(model, INPUT_IDS)
    inputs, outputs = (embed(model, blocks, INPUT_IDS, 4) for _ in range(2))
    return Trial.begin(lambda: blocks, inputs, outputs, head_of(model, blocks, INPUT_IDS), 4)


@cache
def wishes(name: str) -> torch.Tensor:
    """What a budget wants at 60 %."""
    budget = BUDGETS[name]
    return (
        budget.search(trial(), 0.6, Progress())
        if isinstance(budget, DepthSearch)
        else budget.sparsities(*loaded(), 0.6, 4)
    )


def scores_of_linears() -> dict[str, torch.Tensor]:
    """|W_ij| ||X_j|| of every linear by `block.path`, in fp64, by hooks on a plain forward pass."""
    model, inputs = torch.nn.Module.to(copy.deepcopy(DENSE), torch.float64), {}
    layers = model.get_submodule("model.layers")
    for name, module in layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, output, name=name: inputs.update({name: args[0]}))
    model(INPUT_IDS, use_cache=False)
    norms = {name: (seen.flatten(0, 1).square().sum(dim=0) / len(INPUT_IDS)).sqrt() for name, seen in inputs.items()}
    return {name: layers.get_parameter(f"{name}.weight").abs() * norm for name, norm in norms.items()}


def scores_of_blocks() -> list[torch.Tensor]:
    """Those of every block's linears together."""
    blocks: dict[str, list[torch.Tensor]] = {}
    for name, score in scores_of_linears().items():
        blocks.setdefault(name.split(".")[0], []).append(score.flatten())
    return [torch.cat(blocks[index]) for index in sorted(blocks)]


def test_owl_is_its_formula() -> None:
    outliers = torch.stack([(score > 5 * score.mean()).double().mean() for score in scores_of_blocks()])
    assert outliers.max() > outliers.min()
    scaled = (outliers - outliers.min()) / (outliers.max() - outliers.min()) * 0.16
    keep = scaled - scaled.mean() + (1 - 0.7)
    torch.testing.assert_close(Owl().sparsities(*loaded(), 0.7, 4), 1 - keep, rtol=1e-3, atol=1e-4)


def test_dlp_is_its_formula() -> None:
    unimportance = torch.stack([score.median() for score in scores_of_blocks()]).double()
    importance = 1 - unimportance / unimportance.sum()
    scaled = (importance - importance.min()) / (importance.max() - importance.min()) * 0.3
    keep = scaled - scaled.mean() + (1 - 0.7)
    torch.testing.assert_close(Dlp().sparsities(*loaded(), 0.7, 4), 1 - keep, rtol=1e-4, atol=1e-5)


def test_dlp_spares_the_block_of_small_scores() -> None:
    blocks, inputs = loaded()
    with torch.no_grad():
        for linear in blocks[0].linears.values():
            linear.weight.mul_(0.01)
    sparsities = Dlp().sparsities(blocks, inputs, 0.7, 4)
    assert sparsities[0] == sparsities.min() < 0.7


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("spoil", [0.6, 1.0], ids=["mostly zeros", "a linear of zeros"])
def test_a_block_of_zeros_gets_a_finite_goal_and_the_total_is_met(name: str, spoil: float) -> None:
    """As in a model that was pruned before: medians, tails and errors of 0."""
    model = copy.deepcopy(DENSE)
    for path, weight in model.get_submodule("model.layers.0").named_parameters():
        if weight.dim() == 2 and (spoil < 1 or "down_proj" in path):
            weight[:, : round(spoil * weight.shape[1])] = 0
    blocks = capture_blocks(model, INPUT_IDS)
    inputs, outputs = (embed(model, blocks, INPUT_IDS, 4) for _ in range(2))
    budget, sizes = BUDGETS[name], [sum(linear.weight.numel() for linear in b.linears.values()) for b in blocks]
    if isinstance(budget, DepthSearch):
        tried = Trial.begin(lambda: blocks, inputs, outputs, head_of(model, blocks, INPUT_IDS), 4)
        goals = exact_goals(budget.search(tried, 0.5, Progress()), sizes, 0.5)
    else:
        goals = exact_goals(budget.sparsities(blocks, inputs, 0.5, 4), sizes, 0.5)
    assert sum(goal.sparsity * size for goal, size in zip(goals, sizes, strict=True)) == pytest.approx(0.5 * sum(sizes))


def test_a_budget_that_is_no_number_is_named() -> None:
    with pytest.raises(RunError, match="block 1 of the budget is nan"):
        exact_goals(torch.tensor([0.5, torch.nan]), [8, 8], 0.5)


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

    for index, (place, level) in itertools.product(range(2), enumerate(levels)):
        pruned, states = loaded()
        states = states[:3]
        for number, block in enumerate(pruned):
            if number == index:
                list(prune_blocks([block], states.clone(), Uniform(), Goal(level), 4))
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
    goals = exact_goals(torch.tensor([wish for wish, _ in blocks]), weights, sparsity)
    counts = [goal.sparsity * size for goal, size in zip(goals, weights, strict=True)]
    assert all(abs(count - round(count)) < 1e-6 for count in counts)
    assert sum(map(round, counts)) == round(sparsity * sum(weights))
    assert all(0 <= goal.sparsity <= 1 for goal in goals)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_leaves_the_blocks_as_they_are(name: str) -> None:
    blocks, inputs = loaded()
    budget = BUDGETS[name]
    if isinstance(budget, DepthSearch):
        tried = trial()
        budget.search(tried, 0.6, Progress())
        blocks = [*tried.blocks()]
    else:
        budget.sparsities(blocks, inputs, 0.6, 4)
    for block in blocks:
        for path, linear in block.linears.items():
            assert torch.equal(linear.weight, DENSE.get_parameter(f"{block.name}.{path}.weight"))


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("name", BUDGETS)
def test_any_pruner_takes_from_each_block_its_target_and_from_the_model_the_total(name: str, pruner: str) -> None:
    """To the weight, also of pruners that take as many from every row, linear or group of columns."""
    blocks, inputs = loaded()
    sizes = [sum(linear.weight.numel() for linear in block.linears.values()) for block in blocks]
    goals = exact_goals(wishes(name), sizes, 0.6)
    wanted = [round(goal.sparsity * size) for goal, size in zip(goals, sizes, strict=True)]
    assert wanted[0] != wanted[1]
    assert sum(wanted) == round(0.6 * sum(sizes))
    reports = [report for report, _ in prune_blocks(blocks, inputs, PRUNERS[pruner], goals, 4)]
    pruned = [sum(linear.pruned for linear in report.linears) for report in reports]
    assert pruned == wanted


def literal_divergence(sparsities: tuple[float, ...], samples: list[int]) -> float:
    """KL(dense || pruned) a token in fp64: whole models, pruned by Wanda on the dense model's norms."""
    model = torch.nn.Module.to(copy.deepcopy(DENSE), torch.float64)
    ids = INPUT_IDS[samples]
    expected = model(ids, use_cache=False).logits.log_softmax(dim=-1)
    for name, score in scores_of_linears().items():
        pruned = int(score.shape[1] * sparsities[int(name.split(".")[0])])
        weight = model.get_parameter(f"model.layers.{name}.weight")
        weight.scatter_(1, score.argsort(dim=1, stable=True)[:, :pruned], 0.0)
    found = model(ids, use_cache=False).logits.log_softmax(dim=-1)
    return float((expected.exp() * (expected - found)).sum(dim=-1).mean())


def test_a_tried_model_is_as_far_from_the_dense_one_as_a_whole_model_so_pruned() -> None:
    models = [(0.5, 0.5), (0.5, 0.7), (0.9, 0.1), (0.5, 0.5), (0.0, 0.0)]
    samples = [1, 4, 6]
    found = trial().divergences(models, torch.tensor(samples))
    assert found == pytest.approx([literal_divergence(model, samples) for model in models], rel=1e-3, abs=1e-6)
    assert found[0] > found[4]


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_atp_is_the_progression_of_the_least_divergence(sparsity: float) -> None:
    """s_i = s - b (L - 1) / 2 + i b of two blocks: s - b / 2 and s + b / 2."""
    samples = [0, 1, 2]
    steps = [0.06 * number for number in range(20) if 0.06 * number <= min(2 * sparsity, 2 - 2 * sparsity)]
    best = min(steps, key=lambda b: literal_divergence((sparsity - b / 2, sparsity + b / 2), samples))
    found = Atp(num_samples=3).search(trial(), sparsity, Progress())
    assert found.tolist() == pytest.approx([sparsity - best / 2, sparsity + best / 2])


def test_atp_keeps_its_mean_and_its_bounds_over_many_blocks() -> None:
    for sparsity in (0.0, 0.05, 0.5, 0.95):
        for wishes in Atp().progressions(sparsity, 32):
            assert float(wishes.mean()) == pytest.approx(sparsity)
            assert wishes.diff().max() == pytest.approx(float(wishes.diff().min()))
            assert -1e-9 <= float(wishes[0]) <= float(wishes[-1]) <= 1 + 1e-9
    assert len(Atp().progressions(0.5, 32)) == 17
    assert len(Atp(step=0.1).progressions(0.8, 32)) == 5  # 2 (1 - 0.8) is 0.3999999999999999


def test_evopress_finds_the_best_levels_of_all() -> None:
    """Two blocks of equal size: their levels are k and -k, up to where one would give up nearly nothing."""
    everything = list(range(len(INPUT_IDS)))
    search = EvoPress(generations=20, children=8, tokens=(len(INPUT_IDS) * 24,), survivors=(1,), width=0.2, levels=4)
    best = min(range(-3, 4), key=lambda k: literal_divergence((0.2 + 0.05 * k, 0.2 - 0.05 * k), everything))
    assert best != 0
    found = search.search(trial(), 0.2, Progress())
    assert found.tolist() == pytest.approx([0.2 + 0.05 * best, 0.2 - 0.05 * best])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=6), st.floats(0.05, 0.95), st.integers(0, 99))
def test_children_keep_the_total_stay_in_bounds_and_are_a_few_exchanges_away(
    sizes: list[int], sparsity: float, seed: int
) -> None:
    space = Space.around(sparsity, sizes, 0.2, 8)
    weights = torch.tensor(sizes, dtype=torch.float64)
    parent: Levels = (0,) * len(sizes)
    for generation in range(4):
        children = space.children(parent, 5, random.Random(f"{seed} {generation}"))
        assert len({parent, *children}) == len(children) + 1
        for child in children:
            found = space.sparsities(child)
            assert float((found * weights).sum()) == pytest.approx(sparsity * float(weights.sum()))
            assert 0 < float(found.min()) <= float(found.max()) < 1
            assert float((found - sparsity).abs().max()) <= 0.2 + 1e-6
            assert sum(abs(one - other) for one, other in zip(child, parent, strict=True)) <= 6
        parent = children[-1] if children else parent


def test_a_search_goes_on_where_it_was_ended_and_ends_alike(tmp_path: Path) -> None:
    whole = EvoPress(generations=6, tokens=(48, 96), seed=3)
    expected = whole.search(trial(), 0.6, Progress(tmp_path / "whole.json"))
    kept = Progress(tmp_path / "search.json")
    EvoPress(generations=4, tokens=(48, 96), seed=3).search(trial(), 0.6, kept)
    assert kept.read()["generations"] == 4
    assert torch.equal(whole.search(trial(), 0.6, kept), expected)
    assert kept.read() == Progress(tmp_path / "whole.json").read()
    kept.write({"generations": 6, "levels": [2, -2]})  # nothing is left to do
    assert whole.search(trial(), 0.6, kept).tolist() == pytest.approx([0.65, 0.55])


def test_a_search_that_cannot_be_read_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text('{"generations": 2, "lev')
    assert Progress(tmp_path / "search.json").read() == {}


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"survivors": (2,)}, "as many numbers"), ({"survivors": (4, 2)}, "end with 1"), ({"children": 0}, "at least 1")],
)
def test_evopress_refuses_selections_that_cannot_be(changes: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        EvoPress(**changes)


def test_a_search_asks_for_no_more_work_than_it_says() -> None:
    """A tried model's tokens and the passes over the blocks, counted as they happen."""
    for budget in (Atp(num_samples=3), EvoPress(generations=3, tokens=(24, 48))):
        tried = trial()
        passes, tokens = [], []
        counted = Trial(
            lambda tried=tried, passes=passes: passes.append(1) or tried.blocks(),
            tried.inputs,
            tried.outputs,
            lambda hidden, tried=tried, tokens=tokens: tokens.append(hidden.shape[:2].numel()) or tried.head(hidden),
            tried.batch_size,
            tried.observed,
            tried.sizes,
        )
        budget.search(counted, 0.6, Progress())
        work, length = budget.work(2, len(INPUT_IDS), INPUT_IDS.shape[1], 0.6), INPUT_IDS.shape[1]
        assert 2 * len(passes) == work.prunings
        assert work.passes == 2 * work.predictions
        dense = sum(tokens) - work.predictions * length  # the head is asked for the dense model's predictions too
        assert 0 < dense <= work.predictions * length


@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_the_learned_budget_measures_with_the_same_samples_on_any_number_of_processes(ranks: int) -> None:
    """Nothing is sent here; of 5 processes the last has none of the 4 samples, and takes one all the same."""
    passed = []
    for rank in range(ranks):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        blocks, inputs = loaded()
        own = inputs[rank::ranks].contiguous()
        blocks[0].arguments(1)
        with blocks[0].module.register_forward_pre_hook(lambda module, args: passed.append(args[0])):
            Learned(num_samples=4, importance="magnitude").sparsities(blocks[:1], own, 0.5, 1)
        dist.destroy_process_group()
    _, inputs = loaded()
    seen = torch.cat(passed)
    found = [number for number, sample in enumerate(inputs) if (seen == sample).all(dim=(1, 2)).any()]
    assert found == [*range(max(4, ranks))]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_learned_budget_makes_as_many_passes_as_it_says(depth: int) -> None:
    blocks, inputs = loaded()
    passed, last = [], blocks[-1]
    last.arguments(4)  # captured by passes that are not counted
    with last.module.register_forward_pre_hook(lambda module, args: passed.append(len(args[0]))):
        Learned(num_samples=4).sparsities([last] * depth, inputs, 0.5, 4)
    assert sum(passed) == Learned(num_samples=4).work(depth, len(INPUT_IDS), INPUT_IDS.shape[1], 0.5).passes


def test_the_uniform_budget_takes_any_target() -> None:
    assert check_budget(SameForAll(), "2:4") == []
    assert not isinstance(SameForAll(), Budget | DepthSearch)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_is_either_measured_or_searched_for(name: str) -> None:
    assert isinstance(BUDGETS[name], Budget) != isinstance(BUDGETS[name], DepthSearch)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_refuses_n_m(name: str) -> None:
    assert check_budget(BUDGETS[name], "unstructured") == []
    assert f"budget={name} with" in check_budget(BUDGETS[name], "2:4")[0]


def test_atp_refuses_a_grid_that_would_never_end() -> None:
    with pytest.raises(ValueError, match=r"budget.step=1e-30: must be in \[0.001, 1\)"):
        Atp(step=1e-30)
