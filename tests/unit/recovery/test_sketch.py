"""Sketches of pruned linears: one entry is 0 and stays so, codes stand still, and there are few values a row."""

from __future__ import annotations

import pytest
import torch
from pruned_llama import WINDOWS, assert_zeros_exact, pruned_llama

from besa_exp.recovery.descent import Adam
from besa_exp.recovery.objective import NextToken
from besa_exp.recovery.sketch import Looked, Sketch, _Rows, sketch_codes, tables

TOLD = Sketch(Adam(lr=1e-3), bits=3)


def stepped(numbers, dtype=torch.float32, pruned=2):
    model, keep = pruned_llama(pruned, dtype)
    tuner = TOLD.begin(model, keep, 0)
    losses = [tuner.step(NextToken(model), WINDOWS[:2], number, 1.0).loss for number in numbers]
    return model, keep, tuner, losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_exact_rows_have_few_values_and_the_loss_falls(dtype):
    model, keep, tuner, losses = stepped(range(4), dtype)
    assert losses[-1] < losses[0]
    assert_zeros_exact(model, keep)
    for name, bits in keep.items():
        form = tuner.forms[name]
        assert isinstance(form, Looked)
        assert not form.table[:, 0].any()
        assert torch.equal(form.codes == 0, ~bits.mask())
        assert all(len(row.unique()) <= 8 for row in model.get_parameter(name))


def test_a_dense_linear_may_use_every_entry():
    model, _, tuner, _ = stepped([], pruned=0)
    name, form = next((name, form) for name, form in tuner.forms.items() if isinstance(form, Looked))
    assert all(len(row.unique()) <= 8 for row in model.get_parameter(name))  # before any step
    assert not form.frozen
    assert "model.norm.weight" in tuner.forms
    assert (form.codes == 0).any()


def test_the_gradient_of_a_table_is_that_of_autograd_and_the_zero_entry_has_none():
    mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) > 0.4
    weight = torch.randn(3, 8, dtype=torch.float64) * mask
    table = tables(weight, mask, 2)
    codes = sketch_codes(weight, table, mask)
    leaf, upstream = table.clone().requires_grad_(), torch.randn(3, 8, dtype=torch.float64)
    (leaf.gather(1, codes.long()) * upstream).sum().backward()
    found = Looked(table, codes, frozen=True).gradients(upstream)["table"]
    assert leaf.grad is not None
    torch.testing.assert_close(found[:, 1:], leaf.grad[:, 1:])
    assert not found[:, 0].any()


def test_two_clusters_join_for_a_split_that_gains_more_than_their_error_rises():
    """By 1.483^2 / 2 = 1.1 more than the 1.16 - 0.08 - 0.08 that the join costs."""
    values = torch.tensor([[0.0, 1.483, 20, 20.4, 21, 21.4]], dtype=torch.float64)
    rows = _Rows.of(values, torch.ones_like(values))
    assert rows._exchanged(torch.tensor([[0, 2, 4, 6]])).tolist() == [[0, 1, 2, 6]]
    assert rows._exchanged(torch.tensor([[0, 1, 2, 6]])).tolist() == [[0, 1, 2, 6]]


def test_k_means_of_a_row_of_few_values_finds_them():
    weight = torch.tensor([[1.0, 1.0, -2.0, 0.0, 3.0, 3.0, 0.0, -2.0]])
    table = tables(weight, weight != 0, 2)
    assert table.tolist() == [[0.0, -2.0, 1.0, 3.0]]
    empty = tables(torch.zeros(1, 8), torch.zeros(1, 8, dtype=torch.bool), 2)
    assert empty.tolist() == [[0.0] * 4]
