"""Updates of the kept weights and RIA's importance against literal formulas in fp64."""

from __future__ import annotations

import pytest
import torch

from besa_exp.methods.updates.admm import RHO, admm, polish
from besa_exp.methods.updates.dsnot import dsnot
from besa_exp.tensors.importance import ria_importance
from besa_exp.tensors.masks import Goal, keep_per_row
from besa_exp.tensors.statistics import InputMoments

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


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_admm_is_the_authors_iteration_from_the_dense_weights_on(iterations: int) -> None:
    """Literally, weights in columns: Z and U first, then the weights by the inverse, and Z once more."""
    kept, inverse = KEEP_MASK.T, torch.linalg.inv(GRAM + torch.eye(12, dtype=torch.float64))
    fitted, found, scaled = GRAM @ WEIGHT.T, WEIGHT.T.clone(), torch.zeros(12, 6, dtype=torch.float64)
    for _ in range(iterations):
        sparse = (found + scaled) * kept
        scaled = scaled + (found - sparse)
        found = inverse @ (fitted + (sparse - scaled))
    expected = ((found + scaled) * kept).T
    lower = torch.linalg.cholesky(GRAM + RHO * torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(admm(WEIGHT, GRAM, lower, KEEP_MASK, iterations), expected, rtol=1e-10, atol=1e-12)


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


def literal_dsnot(weight, total, variance, squared_norm, keep_mask, cycles, threshold, group):
    """Row by row and cycle by cycle, in fp64; `group` None: the whole row is one, as often as it has a pair."""
    kept, columns = keep_mask.clone(), keep_mask.shape[1]
    for row in range(len(weight)):
        part = [float(weight[row, j]) * float(total[j]) for j in range(columns)]
        gain = [abs(part[j]) / float(variance[j]) for j in range(columns)]
        wanda = [abs(float(weight[row, j])) * float(squared_norm[j]) ** 0.5 for j in range(columns)]
        error = sum(part[j] for j in range(columns) if not keep_mask[row, j])
        sign, moved = 1 if error > 0 else -1, set()
        for _ in range(cycles):
            pairs = []
            for first in range(0, columns, group or columns):
                mine = [j for j in range(first, first + (group or columns)) if j not in moved]
                back = [j for j in mine if not keep_mask[row, j] and part[j] * sign > 0]
                gone = [j for j in mine if keep_mask[row, j] and part[j] * sign < 0]
                if back and gone:
                    pairs.append((max(back, key=gain.__getitem__), min(gone, key=wanda.__getitem__)))
            if abs(error) <= threshold or not pairs:
                break
            back, gone = max(pairs, key=lambda pair: gain[pair[0]])
            if (error - part[back] + part[gone]) * sign <= 0:
                break
            error += part[gone] - part[back]
            kept[row, back], kept[row, gone] = True, False
            moved |= {back, gone} if group is None else set(range(back - back % group, back - back % group + group))
    return kept


@pytest.mark.parametrize("cycles", [1, 3, 50])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 3.0])
@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, "unstructured"), (0.9, "unstructured"), (0.5, "2:4")])
def test_dsnot_is_its_loop_over_rows_and_cycles(cycles, threshold, sparsity, pattern) -> None:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(3, 5, 24, generator=generator) * torch.rand(24, generator=generator) + 0.2
    weight, target = torch.randn(40, 24, generator=generator), Goal.parse(sparsity, pattern)
    seen = InputMoments(24, weight.device)
    seen.add(inputs)
    seen.sum_over_ranks(3)
    keep_mask = keep_per_row(weight.abs(), target)
    given = weight, seen.total, seen.variance, seen.squared_norm, keep_mask, cycles, threshold
    group = target.pattern[1] if target.pattern else None
    edited = dsnot(*given, group)
    assert torch.equal(edited, literal_dsnot(*given, group))
    assert not torch.equal(edited, keep_mask)
    width = group or 24
    assert torch.equal(edited.view(-1, width).sum(dim=1), keep_mask.view(-1, width).sum(dim=1))


def test_dsnot_revives_the_weight_of_a_constant_input_first_and_never_that_of_a_dead_one() -> None:
    seen = InputMoments(4, WEIGHT.device)
    seen.add(torch.tensor([[0.0, 1.0, 2.0, -1.0], [0.0, 1.0, -1.0, 1.5]]))
    seen.sum_over_ranks(1)
    weight, kept = torch.tensor([[9.0, 50.0, 5.0, -2.0]]), torch.tensor([[False, False, False, True]])
    edited = dsnot(weight, seen.total, seen.variance, seen.squared_norm, kept)
    assert edited.tolist() == [[False, True, False, False]]


def test_input_moments_are_means_over_samples_and_the_variance_of_all_tokens() -> None:
    inputs = torch.randn(5, 6, 3, generator=GENERATOR) + 2
    seen = InputMoments(3, inputs.device)
    for batch in inputs.split(2):
        seen.add(batch)
    seen.sum_over_ranks(len(inputs))
    exact = inputs.double()
    torch.testing.assert_close(seen.total.double(), exact.sum(dim=1).mean(dim=0))
    torch.testing.assert_close(seen.squared_norm.double(), exact.square().sum(dim=1).mean(dim=0))
    torch.testing.assert_close(seen.variance.double(), exact.flatten(0, 1).var(dim=0, correction=0))
