"""Updates of the kept weights and RIA's importance against literal formulas in fp64."""

from __future__ import annotations

import torch

from besa_exp.importance import ria_importance
from besa_exp.updates.admm import RHO, admm, polish

GENERATOR = torch.Generator().manual_seed(3)
INPUTS = torch.randn(400, 12, generator=GENERATOR, dtype=torch.float64) @ torch.randn(
    12, 12, generator=GENERATOR, dtype=torch.float64
)
GRAM = INPUTS.T @ INPUTS / len(INPUTS)
GRAM = GRAM / GRAM.diagonal().sqrt() / GRAM.diagonal().sqrt()[:, None] + 0.1 * torch.eye(12, dtype=torch.float64)
WEIGHT = torch.randn(6, 12, generator=GENERATOR, dtype=torch.float64)
KEEP_MASK = torch.rand(6, 12, generator=GENERATOR) > 0.5


def least_squares() -> torch.Tensor:
    """Row by row: the normal equations on the kept inputs."""
    solution = torch.zeros_like(WEIGHT)
    for row, kept in enumerate(KEEP_MASK):
        solution[row, kept] = torch.linalg.solve(GRAM[kept][:, kept], (GRAM @ WEIGHT[row])[kept])
    return solution


def squared_error(found: torch.Tensor) -> torch.Tensor:
    difference = found - WEIGHT
    return ((difference @ GRAM) * difference).sum()


def test_admm_approaches_the_least_squares_solution_on_the_kept_weights() -> None:
    lower = torch.linalg.cholesky(GRAM + RHO * torch.eye(12, dtype=torch.float64))
    rough, fine = (admm(WEIGHT, GRAM, lower, KEEP_MASK, iterations) for iterations in (20, 2000))
    torch.testing.assert_close(fine, least_squares(), rtol=1e-6, atol=1e-8)
    zeroed, best = squared_error(WEIGHT * KEEP_MASK), squared_error(least_squares())
    assert squared_error(rough) - best < 0.2 * (zeroed - best)


def test_conjugate_gradients_end_at_the_least_squares_solution() -> None:
    found = polish(WEIGHT, WEIGHT, GRAM, KEEP_MASK, 12)  # as many iterations as inputs
    torch.testing.assert_close(found, least_squares(), rtol=1e-6, atol=1e-8)


def test_conjugate_gradients_stay_where_nothing_is_left_to_do() -> None:
    kept = torch.ones_like(KEEP_MASK)
    torch.testing.assert_close(polish(WEIGHT, WEIGHT, GRAM, kept, 5), WEIGHT)
    assert not polish(WEIGHT, WEIGHT, GRAM, ~kept, 5).any()


def test_ria_is_its_formula() -> None:
    weight, norm = torch.randn(5, 7, generator=GENERATOR), torch.rand(7, generator=GENERATOR)
    found = ria_importance(weight, norm.square())
    for row in range(5):
        for column in range(7):
            size = abs(float(weight[row, column]))
            of_row = size / sum(abs(float(value)) for value in weight[row])
            of_column = size / sum(abs(float(value)) for value in weight[:, column])
            expected = (of_row + of_column) * float(norm[column]) ** 0.5
            assert abs(float(found[row, column]) - expected) < 1e-5


def test_ria_takes_rows_and_columns_of_zeros() -> None:
    weight = torch.zeros(3, 4)
    weight[0, 0] = 1
    assert ria_importance(weight, torch.ones(4)).isfinite().all()
