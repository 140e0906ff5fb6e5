"""Importance as a value, by name or as an object, in pruners, searches and budgets; and observed gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from pruner_cases import DENSE, INPUT_IDS, prune_tiny

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.observation import Observed, squared_gradients
from besa_exp.cli.reading import UNREAD, Reader
from besa_exp.methods.budgets.dlp import Dlp
from besa_exp.methods.budgets.owl import Owl
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.besa_joint import BesaJoint
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.presets import preset
from besa_exp.tensors.importance import IMPORTANCES, Ria, Wanda, WandaPlus, importance_of


def blocks_and_inputs():
    model = copy.deepcopy(DENSE)
    blocks = capture_blocks(model, INPUT_IDS)
    return blocks, embed(model, blocks, INPUT_IDS, 4)


def test_squared_gradients_are_those_of_each_samples_output_norm_by_finite_differences():
    blocks, inputs = blocks_and_inputs()
    module = blocks[0].module.double()
    weight = module.get_parameter("mlp.up_proj.weight")
    found = squared_gradients(blocks[0], inputs[:3].double())["mlp.up_proj"]
    for row, column in ((0, 0), (5, 7), (31, 2)):
        norms = []
        for shift in (1e-6, -1e-6):
            with torch.no_grad():
                weight[row, column] += shift
                norms.append([blocks[0](sample).norm().item() for sample in inputs[:3].double().split(1)])
                weight[row, column] -= shift
        slopes = [(up - down) / 2e-6 for up, down in zip(*norms, strict=True)]
        expected = sum(slope**2 for slope in slopes) / 3
        assert float(found[row, column]) == pytest.approx(expected, rel=1e-3)


def test_wanda_plus_is_its_formula_and_wanda_where_nothing_depends_on_the_weights():
    weight, norm, squared = torch.randn(4, 6), torch.rand(6), torch.rand(4, 6)
    statistic = Wanda.statistic(6, weight.device)
    statistic.add(norm.sqrt()[None])
    statistic.sum_over_ranks(1)
    scores = WandaPlus()(weight, statistic, squared)
    torch.testing.assert_close(scores, weight.abs() * (100 * squared.sqrt() + norm.sqrt()))
    torch.testing.assert_close(WandaPlus()(weight, statistic, 0 * squared), Wanda()(weight, statistic, None))


@pytest.mark.parametrize("name", IMPORTANCES)
def test_a_row_loses_its_least_important_weights_by_any_importance(name):
    blocks, inputs = blocks_and_inputs()
    observed, _ = Observed.of(importance_of(name), blocks[0], inputs, 4)
    _, pruned = prune_tiny(Uniform(name))[1][0]
    for linear, keep_mask in pruned.keep_masks.items():
        score = observed.score(blocks[0], linear)
        lowest_kept = score.masked_fill(~keep_mask, torch.inf).amin(dim=1)
        highest_gone = score.masked_fill(keep_mask, -torch.inf).amax(dim=1)
        assert (highest_gone <= lowest_kept).all()


def test_the_preset_of_ria_sets_weights_beside_all_others_of_their_linear_as_its_authors_do():
    """Literally, in fp64: shares of the column and of the row; the matrix is cut at the middle of its sorted scores."""
    blocks, inputs = blocks_and_inputs()
    observed, _ = Observed.of(Ria(), blocks[0], inputs, 4)
    _, pruned = prune_tiny(preset("pruner", "ria"))[1][0]
    for name, linear in blocks[0].linears.items():
        size, norm = linear.weight.detach().double().abs(), observed.statistics[name].squared_norm.double().sqrt()
        score = (size / size.sum(dim=0) + size / size.sum(dim=1).reshape(-1, 1)) * norm.reshape(1, -1) ** 0.5
        assert torch.equal(pruned.keep_masks[name], score >= score.flatten().sort().values[score.numel() // 2])


def test_an_importance_by_name_is_the_one_given_as_an_object_and_another_one_prunes_other_weights():
    for make in (Uniform, lambda importance: Besa(importance=importance, epochs=1)):
        by_name, by_value, other = (prune_tiny(make(one))[1][0][1].keep_masks for one in ("ria", Ria(), "wanda"))
        assert all(torch.equal(by_name[name], by_value[name]) for name in by_name)
        assert any(not torch.equal(by_name[name], other[name]) for name in by_name)


@pytest.mark.parametrize("budget", [Owl, Dlp])
def test_a_budget_asks_the_importance_that_it_is_given(budget):
    shares = [budget(importance=name).sparsities(*blocks_and_inputs(), 0.6, 4) for name in ("wanda", "magnitude")]
    assert not torch.equal(*shares)


def test_an_unknown_importance_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match="importance=wander: must be one of magnitude, wanda, ria"):
        getattr(importance_of, "__wrapped__", importance_of)("wander")  # type: ignore[arg-type]  # the tests' own check of types stays out


def test_joint_compression_ranks_by_its_own_importance_alone():
    with pytest.raises(ValueError, match=r"pruner\.pruner\.importance=ria"):
        BesaJoint(Besa(importance="ria"))


TARGET = "besa_exp.methods.pruners.besa.Besa"


def test_yaml_gives_an_importance_by_name_or_as_an_object_with_its_own_keys():
    reader = Reader()
    given = {"_target_": "besa_exp.tensors.importance.Ria", "power": 0.3}
    by_name, by_value = (
        reader.node({"_target_": TARGET, "importance": value}, Besa, "pruner") for value in ("ria", given)
    )
    assert not reader.problems
    assert (by_name.importance, by_value.importance) == ("ria", Ria(0.3))


def test_a_misspelt_importance_is_refused_by_key_with_the_nearest_name():
    reader = Reader()
    assert reader.node({"_target_": TARGET, "importance": "wanada"}, Besa, "pruner") is UNREAD
    assert "did you mean wanda" in reader.problems["pruner.importance"].lower()
