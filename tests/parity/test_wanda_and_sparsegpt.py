"""Wanda and SparseGPT against their authors' codes on one recorded linear, and against the closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from near_ties import assert_differ_at_near_ties_alone
from safetensors.torch import load_file

from besa_exp.methods.pruners.sparsegpt import sparsegpt
from besa_exp.tensors.hessian import upper_factor
from besa_exp.tensors.importance import wanda_importance
from besa_exp.tensors.masks import Goal, keep_per_row
from besa_exp.tensors.statistics import Hessian, InputNorm

GOLDEN_DIR = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN_DIR / "linear.safetensors")


@pytest.fixture(scope="module")
def factor(golden):
    return upper_factor(observed(Hessian, golden["inputs"]).matrix, 0.01, "golden linear")


def observed(statistic, inputs, batch_size=1):
    result = statistic(inputs.shape[-1], inputs.device)
    for batch in inputs.split(batch_size):
        result.add(batch)
    result.sum_over_ranks(len(inputs))
    return result


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_input_norm_is_wandas_statistic_whatever_the_batches(golden, batch_size):
    statistic = observed(InputNorm, golden["inputs"], batch_size)
    torch.testing.assert_close(statistic.squared_norm, golden["wanda_scaler_row"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_hessian_is_sparsegpts_whatever_the_batches(golden, batch_size):
    hessian = observed(Hessian, golden["inputs"], batch_size).matrix
    torch.testing.assert_close(hessian, golden["sparsegpt_hessian"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "target"),
    [("50", Goal(0.5)), ("70", Goal(0.7)), ("2_4", Goal.parse(0.5, "2:4"))],
)
def test_wanda_prunes_the_weights_its_authors_code_prunes(golden, name, target):
    importance = wanda_importance(golden["weight"], observed(InputNorm, golden["inputs"]).squared_norm)
    torch.testing.assert_close(importance, golden["wanda_metric"], rtol=1e-5, atol=0)
    sets = (-1, target.pattern[1] if target.pattern else importance.shape[1])
    found, theirs = keep_per_row(importance, target).view(sets), ~golden[f"wanda_prune_mask_{name}"].view(sets)
    assert_differ_at_near_ties_alone(found, theirs, importance.view(sets), 1e-5)


def test_sparsegpt_with_2_of_4_is_its_authors_result(golden, factor):
    weight = golden["weight"].clone()
    weight[:, 5] = 0
    pruned, keep_mask = sparsegpt(weight, factor, Goal.parse(0.5, "2:4"), group_size=16)
    torch.testing.assert_close(pruned, golden["sparsegpt_2_4_group16"], rtol=0, atol=1e-4)
    assert keep_mask.view(48, 16, 4).sum(-1).eq(2).all()


@pytest.mark.parametrize(("name", "sparsity", "group_size"), [("50_group16", 0.5, 16), ("70_group64", 0.7, 64)])
def test_sparsegpt_with_the_authors_mask_is_their_result_at_any_group_size(golden, factor, name, sparsity, group_size):
    expected = golden[f"sparsegpt_{name}"]
    weight = golden["weight"].clone()
    weight[:, 5] = 0
    for size in (group_size, 1, 7, 128):
        pruned, _ = sparsegpt(weight, factor, Goal(sparsity), size, keep_mask=expected != 0)
        torch.testing.assert_close(pruned, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "sparsity", "group_size"), [("50_group16", 0.5, 16), ("70_group64", 0.7, 64)])
def test_our_mask_leaves_out_the_one_weight_too_many_that_the_authors_threshold_takes(
    golden, factor, name, sparsity, group_size
):
    """In the first group both see the same weights, so the masks differ by exactly that weight."""
    weight = golden["weight"].clone()
    weight[:, 5] = 0
    _, keep_mask = sparsegpt(weight, factor, Goal(sparsity), group_size)
    count = int(48 * group_size * sparsity)
    theirs = golden[f"sparsegpt_{name}"] == 0
    for start in range(0, 64, group_size):
        assert int((~keep_mask)[:, start : start + group_size].sum()) == count
        assert int(theirs[:, start : start + group_size].sum()) in (count + 1, count + 2)
    first_ours, first_theirs = ~keep_mask[:, :group_size], theirs[:, :group_size]
    dead = torch.zeros_like(first_ours)
    dead[:, 5] = True  # zero before pruning, so zero in their result whether chosen or not
    assert int((first_theirs & ~first_ours & ~dead).sum()) == 1
    assert not (first_ours & ~first_theirs).any()


def test_one_pruned_column_is_the_closed_form_obs_update(golden):
    """w - (w_p / [H^-1]_pp) H^-1_p, in fp64, for a first column: later columns alone move."""
    hessian = observed(Hessian, golden["inputs"]).matrix.double()
    hessian[5, 5] = 1
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    weight = golden["weight"].double()
    expected = weight - (weight[:, :1] / inverse[0, 0]) * inverse[0]
    keep_mask = torch.ones_like(golden["weight"], dtype=torch.bool)
    keep_mask[:, 0] = False
    factor = upper_factor(observed(Hessian, golden["inputs"]).matrix, 0.01, "here")
    pruned, _ = sparsegpt(golden["weight"], factor, Goal(0.5), 16, keep_mask)
    torch.testing.assert_close(pruned[:, 1:].double(), expected[:, 1:], rtol=0, atol=1e-4)
    assert pruned[:, 0].eq(0).all()


def test_with_a_diagonal_hessian_sparsegpt_orders_weights_as_wanda_does(golden):
    norms = golden["wanda_scaler_row"].clamp(min=0.1)
    factor = upper_factor(torch.diag(2 * norms), 1e-9, "here")
    weight = golden["weight"][:1]
    _, keep_mask = sparsegpt(weight, factor, Goal(0.5), 64)
    importance = wanda_importance(weight, norms)
    assert_differ_at_near_ties_alone(keep_mask, keep_per_row(importance, Goal(0.5)), importance, 1e-5)
