"""SparseGrad against the recorded layers of its authors' code, and against what that code got wrong."""

from __future__ import annotations

import pytest
import torch
from recorded_llama import recorded, recorded_llama

from besa_exp.recovery.objective import NextToken
from besa_exp.recovery.sparsegrad import Rotated, SparseGrad, basis, largest

KINDS = {"up": "mlp.up_proj", "down": "mlp.down_proj"}


@pytest.fixture(scope="module")
def golden(shared_dir):
    return recorded(shared_dir, "sparsegrad")


@pytest.fixture(scope="module")
def gathered(shared_dir, golden):
    """The tuner after the recorded gradients: three batches, both blocks, no step."""
    model, windows = recorded_llama(shared_dir)
    tuner = SparseGrad(gather=3).begin(model, {}, 0)
    for number, rows in enumerate(golden[1]["bank_batches"]):
        tuner.step(NextToken(model, micro_batch=4), windows[rows], number, 1.0)
    return tuner


def of_kind(tuner, kind):
    """What was gathered of its linears, which are of one shape here."""
    (both,) = (both for name, both in tuner.products.items() if name.startswith(f"{kind}_proj "))
    return both


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("side", "place"), [("out", 0), ("in", 1)])
def test_bases_span_the_recorded_singular_vectors(golden, gathered, kind, side, place):
    """Where a singular value stands alone: the square of it is the eigenvalue here, which loses half the digits."""
    tensors, _ = golden
    products = of_kind(gathered, kind)[place].double()
    ours, theirs = basis(products), tensors[f"{kind}.basis_{side}"].double()
    values = tensors[f"{kind}.singular_values_{side}"].double()
    eigenvalues = torch.linalg.eigvalsh(products).flip(0)
    torch.testing.assert_close(eigenvalues[:20].sqrt(), values[:20], rtol=1e-4, atol=0)
    alone = [n for n in range(1, 20) if min(values[n - 1] - values[n], values[n] - values[n + 1]) > 0.01 * values[n]]
    assert alone
    for n in alone:
        assert abs(float(ours[:, n] @ theirs[:, n])) > 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_with_the_authors_transposed_basis_are_the_recorded_ones(golden, shared_dir, kind):
    """Their coordinates are ours with Q^T in the place of Q; their threshold keeps |entries| above the k-th signed."""
    tensors, told = golden
    model, _ = recorded_llama(shared_dir)
    weight = model.get_parameter(f"model.layers.0.{KINDS[kind]}.weight").detach()
    P, Q = tensors[f"{kind}.basis_out"], tensors[f"{kind}.basis_in"].T
    form = Rotated(P.T @ weight @ Q, P, Q, told["k"])
    back = torch.empty_like(weight)
    form.write(back)
    x, upstream = tensors[f"{kind}.x"], tensors[f"{kind}.grad_output"]
    torch.testing.assert_close(x @ back.T, tensors[f"{kind}.y"], rtol=0, atol=1e-4)
    torch.testing.assert_close(upstream @ back, tensors[f"{kind}.grad_input"], rtol=0, atol=1e-4)
    gradient = upstream.flatten(0, 1).T @ x.flatten(0, 1)
    recorded_gradient = tensors[f"{kind}.weight_grad"]
    there = recorded_gradient != 0
    torch.testing.assert_close((P.T @ gradient @ Q)[there], recorded_gradient[there], rtol=0, atol=1e-4)
    kept = form.gradients(gradient)["rotated"]
    assert int((kept != 0).sum()) == told["k"] < int(there.sum()) == told[f"{kind}_backward"]["kept"]
    assert there[kept != 0].all()


@pytest.mark.parametrize("kind", KINDS)
def test_these_coordinates_hold_more_energy_than_the_authors(golden, gathered, shared_dir, kind):
    model, windows = recorded_llama(shared_dir)
    model.requires_grad_(True)
    NextToken(model, micro_batch=4).differentiate(windows[12:16])
    gradient = model.get_parameter(f"model.layers.0.{KINDS[kind]}.weight").grad
    assert gradient is not None
    P, Q = (basis(product) for product in of_kind(gathered, kind))

    def energy(rotated):
        return float(largest(rotated, rotated.numel() // 100).square().sum() / rotated.square().sum())

    ours, theirs = energy(P.T @ gradient @ Q), energy(P.T @ gradient @ Q.T)
    assert ours > 1.15 * theirs
