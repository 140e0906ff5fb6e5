"""Sketches against LeanQuant's recorded tables, and the recorded products of the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from recorded_llama import recorded

from besa_exp.recovery.sketch import Looked, _evenly, _lloyd, sketch_codes, tables


@pytest.fixture(scope="module")
def golden(shared_dir):
    return recorded(shared_dir, "sketch")[0]


def error(weight, table, shares):
    return ((weight[..., None] - table[:, None]).abs().amin(dim=-1).square() * shares).sum(dim=1)


@pytest.mark.parametrize(("bits", "most"), [(2, 0.9), (3, 0.7), (4, 1.2)])
def test_tables_are_about_as_good_as_the_recorded_ones(golden, bits, most):
    """Their weighted error, as a share of that of the recorded tables: 16 entries for 64 weights, which began at random
    places there, are the hardest."""
    shares = golden["hinv_cholesky_diagonal"].pow(-4)
    weight = golden["weight"].double()
    ours, theirs = tables(weight, None, bits, shares), golden[f"table_{bits}bit"].double()
    assert float(error(weight, ours, shares).sum()) <= most * float(error(weight, theirs, shares).sum())


def test_begun_evenly_four_entries_come_to_the_recorded_values(golden):
    weight = golden["weight"].double()
    shares = golden["hinv_cholesky_diagonal"].pow(-4).expand_as(weight)
    ours = _lloyd(weight, shares, _evenly(weight, shares, 4))
    torch.testing.assert_close(ours, golden["table_2bit"].double().sort(dim=1).values, rtol=0, atol=1e-6)


def test_codes_outputs_and_gradients_are_the_recorded_ones(golden):
    table = golden["table_4bit"].double()
    codes = sketch_codes(golden["weight"].double(), table, None)
    assert torch.equal(codes, golden["codes_4bit"])
    form = Looked(table, codes, frozen=False)
    weight = torch.empty(codes.shape, dtype=torch.float64)
    form.write(weight)
    x = golden["x"][:10].double()
    torch.testing.assert_close(x @ weight.T, golden["y"], rtol=1e-12, atol=1e-12)
    found = form.gradients(golden["grad_output"].T @ x)["table"]
    torch.testing.assert_close(found, golden["grad_table_4bit"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(golden["grad_output"] @ weight, golden["grad_input"], rtol=1e-12, atol=1e-12)
