"""The factor of a Hessian that rounding, or too few tokens, left indefinite."""

from __future__ import annotations

import logging

import pytest
import torch

from besa_exp.errors import RunError
from besa_exp.tensors.hessian import upper_factor

DAMPING = 0.01


def hessian(smallest: float) -> torch.Tensor:
    """Two inputs; the eigenvalues are `smallest` and 2 - `smallest`, the mean of the diagonal is 1."""
    return torch.tensor([[1.0, 1 - smallest], [1 - smallest, 1.0]])


def test_an_indefinite_hessian_is_damped_more_and_the_log_names_the_linear(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "besa_exp.tensors.importance"):
        factor = upper_factor(hessian(-0.05), DAMPING, "model.layers.3.mlp.up_proj").double()
    damped = hessian(-0.05).double() + 10 * DAMPING * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(factor @ factor.T, damped, rtol=1e-5, atol=1e-6)
    assert torch.equal(factor, factor.triu())
    assert len(caplog.records) == 1
    assert "model.layers.3.mlp.up_proj: the Hessian is not positive definite at damping 0.01, trying 0.1" in caplog.text


def test_a_hessian_that_no_damping_makes_definite_ends_the_run_with_linear_and_remedy(caplog) -> None:
    match = r"model.layers.3.mlp.up_proj: .*not positive definite even at damping 10 .*more calibration tokens"
    with pytest.raises(RunError, match=match):
        upper_factor(hessian(-20.0), DAMPING, "model.layers.3.mlp.up_proj")
    assert caplog.messages[-1].endswith("at damping 1, trying 10")
