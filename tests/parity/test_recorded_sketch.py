"""Sketches against LeanQuant's recorded tables, and the recorded products of the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from recorded_llama import recorded

from besa_exp.recovery.sketch import Looked, clustered, sketch_codes


@pytest.fixture(scope="module")
def golden(shared_dir):
    return recorded(shared_dir, "sketch")[0]


def error(weight, table, shares):
    return ((weight[..., None] - table[:, None]).abs().amin(dim=-1).square() * shares).sum(dim=1)


def least(values, shares, count):
    """Of all clusterings of a row into neighbours, by dynamic programming."""
    rising, order = values.sort()
    sums = [torch.cat([torch.zeros(1), (shares[order] * rising**p).cumsum(0)]) for p in range(3)]
    mass, mean, square = (one[None, :] - one[:, None] for one in sums)  # of the values from one place to another
    cost = (square - mean**2 / mass.clamp(min=1e-300)).masked_fill(mass < 0, torch.inf).clamp(min=0)
    best = cost[0]
    for _ in range(count - 1):
        best = (best[:, None] + cost).amin(dim=0)
    return float(best[-1])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_are_better_than_the_recorded_ones_and_near_the_best_there_are(golden, bits):
    """By their weighted error; the recorded clustering began at random places and took Lloyd's steps alone."""
    shares = golden["hinv_cholesky_diagonal"].pow(-4)
    weight = golden["weight"].double()
    every = shares.double().expand_as(weight)
    ours, theirs = (
        float(error(weight, table, shares).sum())
        for table in (
            clustered(weight, every, 1 << bits),
            golden[f"table_{bits}bit"].double(),
        )
    )
    assert ours < 0.87 * theirs
    assert ours < 1.05 * sum(least(row, shares.double(), 1 << bits) for row in weight)


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
