"""The simulated accelerator: vectorised cycles against a literal walk over the weights, and what must hold of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa_exp.evaluation.simulated_speed import MODEL, simulated_cycles, simulated_speed


def literal_patch(rows: list[list[int]]) -> int:
    """The model as it is told: weight by weight, thresholds in exact tenths, one list of columns for each part."""
    height, width = len(rows), len(rows[0])
    tried = []
    threshold = 5
    while len(tried) < 5:
        work = {"dense": 0, "sparse": 0}
        kept_in_dense = total = 0
        for column in range(width):
            kept = sum(rows[row][column] for row in range(height))
            total += kept
            if kept / height > threshold / 10 + 1e-12:
                work["dense"] += height
                kept_in_dense += kept
            else:
                work["sparse"] += kept
        together = work["dense"] + work["sparse"]
        if work["dense"] and work["sparse"]:
            for_dense = max(1, math.floor(64 * work["dense"] / together))
            shares = {"dense": for_dense, "sparse": 64 - for_dense}
        else:
            shares = {"dense": 64, "sparse": 64}
        tried.append(max(math.ceil(work[part] / (64 * shares[part])) for part in work))
        share = kept_in_dense / total if total else 0.0
        if share >= 0.6 - 1e-12:
            threshold += 1
        elif share <= 0.4 + 1e-12:
            threshold -= 1
        else:
            break
    return min(tried)


def literal_cycles(rows: list[list[int]]) -> tuple[int, int]:
    height, width = len(rows), len(rows[0])
    size = height if width > height else width
    patches = [[row[start : start + size] for row in rows] for start in range(0, width, size)]
    dense = sum(math.ceil(height * len(patch[0]) / (64 * 64)) for patch in patches)
    return dense, sum(literal_patch(patch) for patch in patches)


def mask_of(rows: int, columns: int, density: float, spread: float, seed: int) -> torch.Tensor:
    """Columns of unlike density, so that there are dense and sparse ones."""
    generator = torch.Generator().manual_seed(seed)
    of_column = density + spread * (torch.rand(columns, generator=generator) - 0.5)
    return torch.rand(rows, columns, generator=generator) < of_column


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 200),
    density=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]),
    spread=st.sampled_from([0.0, 0.6, 2.0]),
    seed=st.integers(0, 1000),
)
def test_cycles_are_those_of_a_literal_walk_over_the_weights(rows, columns, density, spread, seed):
    mask = mask_of(rows, columns, density, spread, seed)
    assert tuple(simulated_cycles(mask)) == literal_cycles(mask.int().tolist())


def test_a_matrix_of_several_patches_and_cycles_is_that_of_the_literal_walk():
    mask = mask_of(200, 500, 0.5, 1.0, 3)
    assert tuple(simulated_cycles(mask)) == literal_cycles(mask.int().tolist())
    assert simulated_cycles(mask).dense == 10 + 10 + 5


def test_a_linear_with_all_its_weights_is_no_faster_and_one_with_none_takes_no_time():
    assert simulated_cycles(torch.ones(4096, 4096, dtype=torch.bool)) == (4096, 4096)
    assert simulated_cycles(torch.ones(4096, 11008, dtype=torch.bool)) == (11008, 11008)
    assert simulated_cycles(torch.zeros(128, 128, dtype=torch.bool)) == (4, 0)


def test_pruning_whole_columns_is_worth_what_it_removes_and_scattered_zeros_less():
    halves = torch.zeros(1024, 1024, dtype=torch.bool)
    halves[:, ::2] = True
    scattered = mask_of(1024, 1024, 0.5, 0.0, 0)
    assert simulated_cycles(halves) == (256, 128)
    assert 128 <= simulated_cycles(scattered).sparse < 256


def test_figures_are_means_by_linear_type_and_say_that_they_are_simulated():
    whole, half = torch.ones(128, 128), torch.ones(128, 128)
    half[:, ::2] = 0
    rows = simulated_speed([("mlp.experts.0.w1", whole), ("mlp.experts.1.w1", half), ("mlp.w2", half)])
    assert list(rows) == ["mlp.experts.w1", "mlp.w2", "all"]
    assert rows["mlp.experts.w1"] == {"dense_cycles": 4, "sparse_cycles": 3, "speed_up": 4 / 3, "sparsity": 0.25}
    assert rows["mlp.w2"]["speed_up"] == 2
    assert rows["all"] == {"dense_cycles": 4, "sparse_cycles": 8 / 3, "speed_up": 1.5, "sparsity": pytest.approx(1 / 3)}
    assert simulated_speed([("w", torch.zeros(64, 64))])["w"]["speed_up"] is None
    assert MODEL.startswith("simulated, not measured")
