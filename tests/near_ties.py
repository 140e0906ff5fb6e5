"""What rounding may do to masks. Sums in another order (of threads, ranks, batches, vector lanes) differ in their last
bits, and so do the scores made of them: a mask chosen by these may differ, but only between weights whose scores are
equal to that rounding. How many such near ties there are depends on the data and the machine; how near they are does
not, so that is what is bounded here, and not a number of equal masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_least_go(keep_mask: Tensor, scores: Tensor, tolerance: float) -> None:
    """In every row no weight that goes scores more than 1 + `tolerance` times one that stays (both [set weight], a
    choice made within each set). Scores that are off by a relative e exchange weights up to (1 + e) / (1 - e) apart."""
    highest_gone = scores.masked_fill(keep_mask, 0).amax(dim=1)
    lowest_kept = scores.masked_fill(~keep_mask, torch.inf).amin(dim=1)
    wrong = highest_gone > (1 + tolerance) * lowest_kept
    assert not wrong.any(), (
        f"pruned weights score up to {(highest_gone / lowest_kept)[wrong].max():.7f} times kept ones"
    )


def assert_differ_at_near_ties_alone(found: Tensor, expected: Tensor, scores: Tensor, tolerance: float) -> None:
    """Two masks [set weight] take as many weights of every set, and where they differ the set's scores lie within
    1 + `tolerance` of each other."""
    assert torch.equal(found.sum(dim=1), expected.sum(dim=1))
    differs = found != expected
    highest, lowest = scores.masked_fill(~differs, 0).amax(dim=1), scores.masked_fill(~differs, torch.inf).amin(dim=1)
    wrong = highest > (1 + tolerance) * lowest
    assert not wrong.any(), (
        f"masks differ where scores are up to {(highest / lowest)[wrong].max():.7f} times each other"
    )


def assert_allocations_agree(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], most: float = 2e-3) -> None:
    """Of two searches' keep masks {linear: [out in]}: the share of a row that is kept differs by `most` in the mean.

    A search rounds its sparsities to counts; one that lies between two counts to rounding tips, the next gradient is
    of other masks, and the courses part by more than rounding. What stays is that both descend the same loss. A row
    moves by up to 0.05 in one step: rows that had gone other ways would be ten times `most` apart and more."""
    shares = [(found[name].sum(dim=1) - mask.sum(dim=1)).abs() / mask.shape[1] for name, mask in expected.items()]
    mean = float(torch.cat(shares).mean())
    assert mean <= most, f"rows' sparsities differ by {mean:.5f} in the mean"


def scores_when_chosen(weight: Tensor, hessian: Tensor, keep_mask: Tensor, group_size: int) -> Tensor:
    """W_ij^2 / U_jj^2 [out in] in fp64 as SparseGPT meets them, group of columns by group, if what it chose before is
    what `keep_mask` says; damping 0.01. A near tie that falls the other way moves all later weights of its row, and
    with them what is chosen, by more than rounding. Given the choices before it, a score follows the inputs smoothly:
    its relative error is at most about fp32's eps times the damped Hessian's condition, which is below 100 in."""
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, scores = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for start in range(0, weight.shape[1], group_size):
        group = slice(start, min(start + group_size, weight.shape[1]))
        scores[:, group] = (left[:, group] / upper.diagonal()[group]).square()
        for j in range(group.start, group.stop):
            left[:, j:] -= torch.where(keep_mask[:, j], 0, left[:, j] / upper[j, j])[:, None] * upper[j, j:]
    return scores
