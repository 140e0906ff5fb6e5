"""Selection and allocation hold for all inputs, not only for typical ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa_exp.methods.allocation import project_to_budget
from besa_exp.methods.n_of_m import round_to_worth, rows_alike
from besa_exp.methods.pruners.candidates import CandidateMask, float_candidates
from besa_exp.tensors.kernels import count_gradient, rank_in_row
from besa_exp.tensors.masks import (
    Goal,
    goals_of_linears,
    keep_by_rank,
    keep_largest,
    keep_largest_of_rows,
    keep_n_of_m,
    keep_rows_to_the_weight,
    round_to_total,
)

QUICK = settings(max_examples=50, deadline=None)


SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31))


def matrices():
    """Small whole numbers as importances: many ties."""
    return SHAPES.map(
        lambda shape: torch.randint(0, 5, shape[:2], generator=torch.Generator().manual_seed(shape[2])).float()
    )


@QUICK
@given(matrices())
def test_ranks_are_a_permutation_that_sorts_each_row_and_breaks_ties_by_position(importance):
    rank = rank_in_row(importance).long()
    columns = importance.shape[1]
    assert torch.equal(rank.sort(dim=1).values, torch.arange(columns).expand_as(rank))
    position = torch.empty_like(rank).scatter_(1, rank, torch.arange(columns).expand_as(rank))
    ordered = importance.gather(1, position)
    assert (ordered.diff(dim=1) >= 0).all()
    assert (position.diff(dim=1)[ordered.diff(dim=1) == 0] > 0).all()


@QUICK
@given(matrices(), st.floats(0, 1))
def test_exactly_k_weights_go_and_none_kept_is_less_important(importance, fraction):
    pruned = int(fraction * importance.numel())
    keep_mask = keep_largest(importance, pruned)
    assert int((~keep_mask).sum()) == pruned
    if 0 < pruned < importance.numel():
        assert importance[~keep_mask].max() <= importance[keep_mask].min()


@QUICK
@given(matrices(), st.floats(0, 1))
def test_rows_of_k_and_k_plus_1_weights_meet_any_number_and_the_cheapest_rows_give_one_more(importance, fraction):
    pruned = int(fraction * importance.numel())
    keep_mask = keep_rows_to_the_weight(importance, pruned)
    each, more = divmod(pruned, len(importance))
    counts = (~keep_mask).sum(dim=1)
    assert int(counts.sum()) == pruned
    assert sorted(counts.tolist()) == [each] * (len(importance) - more) + [each + 1] * more
    assert torch.equal(keep_mask, rank_in_row(importance) >= counts[:, None])
    if more:
        following = importance.sort(dim=1).values[:, each]
        assert following[counts > each].max() <= following[counts == each].min()


@QUICK
@given(st.lists(st.integers(1, 500), min_size=1, max_size=7), st.floats(0, 0.999))
def test_the_linears_of_a_block_share_an_exact_number_and_no_other(sizes, sparsity):
    sizes = {str(place): size for place, size in enumerate(sizes)}
    assert set(goals_of_linears(sizes, Goal(sparsity)).values()) == {Goal(sparsity)}
    found = goals_of_linears(sizes, Goal(sparsity, exact=True))
    counts = {name: target.sparsity * sizes[name] for name, target in found.items()}
    assert sum(round(count) for count in counts.values()) == round(sparsity * sum(sizes.values()))
    assert all(abs(count - sparsity * sizes[name]) < 1 + 1e-6 for name, count in counts.items())


@QUICK
@given(matrices(), st.floats(0, 1))
def test_a_rows_most_important_weights_are_those_of_the_highest_ranks(importance, fraction):
    pruned = int(fraction * importance.shape[1])
    keep_mask = keep_largest_of_rows(importance, pruned)
    assert torch.equal(keep_mask, rank_in_row(importance) >= pruned)


def test_threads_that_share_the_rows_of_a_large_matrix_change_no_mask_and_no_rank():
    importance = torch.rand(3001, 301, generator=torch.Generator().manual_seed(0))
    expected = importance.argsort(dim=1, stable=True).argsort(dim=1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(rank_in_row(importance).long(), expected)
        assert torch.equal(keep_largest_of_rows(importance, 100), expected >= 100)
    finally:
        torch.set_num_threads(before)


def test_what_is_not_a_number_is_kept_so_that_it_is_noticed():
    importance = torch.tensor([[3.0, float("nan"), 1.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    assert keep_largest_of_rows(importance, 2).tolist() == [[True, True, False, False], [False, False, True, True]]


@QUICK
@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 9), st.data())
def test_n_of_m_keeps_exactly_the_n_most_important_of_every_group(rows, groups, size, data):
    kept = data.draw(st.integers(1, size - 1))
    importance = torch.randint(0, 4, (rows, groups * size), generator=torch.Generator().manual_seed(size)).float()
    keep_mask = keep_n_of_m(importance, kept, size)
    by_group, scores = keep_mask.view(rows, groups, size), importance.view(rows, groups, size)
    assert by_group.sum(-1).eq(kept).all()
    kept_least = scores.masked_fill(~by_group, float("inf")).amin(-1)
    assert (scores.masked_fill(by_group, -1).amax(-1) <= kept_least).all()


@QUICK
@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.data())
def test_rounding_meets_the_total_and_moves_no_count_by_one_or_more(counts, data):
    counts = torch.tensor(counts, dtype=torch.float64)
    total = data.draw(st.integers(int(counts.floor().sum()), int(counts.floor().sum()) + len(counts)))
    rounded = round_to_total(counts, total)
    assert int(rounded.sum()) == total
    assert (rounded - counts.floor()).unique().tolist() in ([0], [1], [0, 1])


@QUICK
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3, unique=True), st.integers(0, 2**31), st.floats(0.2, 0.8))
def test_rounding_by_worth_meets_the_nearest_total_that_whole_levels_reach(worths, seed, share):
    """With 400 rows of the least worth there is room to make up what the others leave."""
    generator = torch.Generator().manual_seed(seed)
    rows = [400 if worth == min(worths) else 20 for worth in worths]
    worth = torch.tensor(worths).repeat_interleave(torch.tensor(rows))
    levels = torch.full_like(worth, 8)
    total = round(share * int((levels * worth).sum()))
    wished = torch.rand(len(worth), generator=generator, dtype=torch.float64) * 0.4 + share - 0.2
    counts = 8 * project_to_budget(wished, (levels * worth).double(), total)
    rounded = round_to_worth(rows_alike(levels, worth), counts, total)
    assert 0 <= int(rounded.min()) <= int(rounded.max()) <= 8
    assert abs(int((rounded * worth).sum()) - total) <= math.gcd(*worths) / 2
    assert float((rounded - counts).abs().mean()) < 1


@QUICK
@given(st.integers(1, 30), st.integers(0, 2**31), st.floats(0, 1))
def test_projection_meets_the_budget_stays_in_bounds_and_keeps_the_order(cells, seed, share):
    generator = torch.Generator().manual_seed(seed)
    sparsity = torch.randn(cells, generator=generator, dtype=torch.float64)
    capacity = torch.randint(1, 1000, (cells,), generator=generator).double()
    total = int(share * capacity.sum())
    projected = project_to_budget(sparsity, capacity, total)
    assert float((capacity * projected).sum()) == pytest.approx(total, abs=1e-6 * float(capacity.sum()))
    assert projected.min() >= 0
    assert projected.max() <= 1
    assert (projected[sparsity.argsort()].diff() >= -1e-12).all()


def soft_mask(beta, cuts, rank):
    """The authors' soft keep mask, literally: 1 - sum of beta_d over candidates whose cut lies above the rank."""
    keep = torch.ones(beta.shape[0], rank.shape[1], dtype=beta.dtype)
    for d, cut in enumerate(cuts.tolist()):
        keep = keep - beta[:, d, None] * (cut > rank)
    return keep


@pytest.mark.parametrize("columns", [1, 63, 64, 127, 172])
@pytest.mark.parametrize("shared", [False, True])
def test_candidate_gradient_is_that_of_the_literal_soft_mask_in_fp64(columns, shared):
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(5, columns, generator=generator)
    rank = rank_in_row(torch.rand(5, columns, generator=generator))
    candidates = float_candidates(0.01)
    cuts = torch.tensor([int(columns * float(p)) for p in candidates])
    beta = torch.rand((len(cuts),) if shared else (5, len(cuts)), generator=generator).softmax(-1).requires_grad_()
    upstream = torch.randn(5, columns, generator=generator)
    masked = CandidateMask.apply(weight, rank, torch.full((5,), columns // 2), beta, cuts)
    assert torch.equal(masked, weight * keep_by_rank(rank, torch.full((5,), columns // 2)))
    (gradient,) = torch.autograd.grad((masked * upstream).sum(), beta)
    literal_beta = beta.detach().double().requires_grad_()
    literal = soft_mask(literal_beta.expand(5, -1), cuts, rank.long())
    (expected,) = torch.autograd.grad((weight.double() * literal * upstream.double()).sum(), literal_beta)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


@QUICK
@given(st.integers(1, 200), st.integers(0, 2**31))
def test_mean_soft_prune_probability_is_the_expected_sparsity_and_never_rises_with_rank(columns, seed):
    candidates = torch.arange(101, dtype=torch.float64) / 100
    cuts = torch.tensor([round(float(p) * columns) for p in candidates])
    beta = torch.rand(1, 101, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    beta /= beta.sum()
    probability = 1 - soft_mask(beta, cuts, torch.arange(columns)[None])
    expected = float((beta[0] * cuts / columns).sum())
    assert float(probability.mean()) == pytest.approx(expected, abs=1e-9)
    assert (probability.diff(dim=1) <= 1e-12).all()


@pytest.mark.parametrize("window", [0.5, 1.0, 6.0, 1000.0])
def test_count_gradient_is_the_literal_mean_over_the_ranks_around_the_cut(window):
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(4, 30, generator=generator), torch.randn(4, 30, generator=generator)
    rank = rank_in_row(torch.rand(4, 30, generator=generator))
    pruned = torch.tensor([0, 1, 15, 30])
    half = max(window / 2, 0.5)
    expected = []
    for row, cut in enumerate(pruned.tolist()):
        near = [j for j in range(30) if cut - half <= int(rank[row, j]) < cut + half]
        width = min(cut + half, 30) - max(cut - half, 0)
        expected.append(-sum(float(weight[row, j]) * float(gradient[row, j]) for j in near) / width)
    result = count_gradient(weight, gradient, rank, pruned, window)
    torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", ["4:4", "0:4", "5:4", "2-4", "2:4:8", "", "n:m"])
def test_a_malformed_pattern_is_refused_with_the_rule(pattern):
    with pytest.raises(ValueError, match="0 < N < M"):
        Goal.parse(0.5, pattern)


def test_a_pattern_fixes_the_sparsity():
    assert Goal.parse(0.1, "1:4") == Goal(0.75, (1, 4))
