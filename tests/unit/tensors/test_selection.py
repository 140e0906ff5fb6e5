"""The k-th smallest number by counting, against a sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies

from besa_exp.tensors import masks, selection
from besa_exp.tensors.selection import kth_smallest

ODD = [0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, 1.0000001]


@given(strategies.lists(strategies.floats(width=32, allow_nan=False) | strategies.sampled_from(ODD), min_size=1))
@settings(max_examples=200, deadline=None)
def test_every_place_holds_what_a_sort_puts_there(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    ordered = values.sort().values
    assert [float(kth_smallest(values, k + 1)) for k in range(len(values))] == ordered.tolist()


def test_nan_of_either_sign_is_larger_than_all() -> None:
    values = torch.tensor([math.nan, 2.0, -math.nan, -math.inf, math.inf])
    assert [float(kth_smallest(values, k)) for k in (1, 2, 3)] == [-math.inf, 2.0, math.inf]
    assert kth_smallest(values, 4).isnan()


@pytest.mark.parametrize("short", [0, 1000])
def test_parts_are_counted_together_bit_by_bit_in_a_long_row(monkeypatch: pytest.MonkeyPatch, short: int) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(selection, "AT_ONCE", 300)
    monkeypatch.setattr(selection, "SHORT", short)
    assert float(kth_smallest(values, 600)) == float(values.kthvalue(600).values)


def test_nothing_is_read_on_the_way_and_a_row_may_be_longer_than_32_bits_count() -> None:
    """On the meta device every host read of a value fails, and every size that depends on one."""
    assert kth_smallest(torch.empty(2**31 + 1, device="meta"), 2**30).shape == ()


def test_only_fp32_is_ordered_by_its_bits() -> None:
    with pytest.raises(AssertionError, match="float64"):
        kth_smallest(torch.zeros(3, dtype=torch.float64), 1)


@pytest.mark.gpu
def test_a_long_row_on_a_gpu_gives_the_mask_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    importance = torch.randn(1, 3 * selection.LONG, generator=torch.Generator().manual_seed(1)).abs().half().float()
    expected = masks.keep_largest_of_rows(importance, 100_000)
    assert torch.equal(masks.keep_largest_of_rows(importance.cuda(), 100_000).cpu(), expected)
