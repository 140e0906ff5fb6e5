"""What calibration accumulates, and the room that this takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from besa_exp.tensors import statistics
from besa_exp.tensors.statistics import InputMoments, InputNorm


class Made(TorchDispatchMode):
    """The most numbers of a tensor that was made, and is no part of another."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not any(each.alias_info for each in func._schema.returns):
            self.most = max(self.most, found.numel())
        return found


@pytest.mark.parametrize("statistic", [InputNorm, InputMoments])
def test_no_copy_of_a_large_batch_is_made(statistic: Any) -> None:
    """8 samples of 2,048 tokens that enter the last linear of a 70B block: 0.9 GB in bf16, 3.8 GB in fp64."""
    device, inputs = torch.device("meta"), torch.empty(8, 2048, 28672, dtype=torch.bfloat16, device="meta")
    found = statistic(28672, device)
    with Made() as made:
        found.add(inputs)
    assert 2**23 < made.most <= 2**24


@pytest.mark.parametrize("statistic", [InputNorm, InputMoments])
def test_parts_of_a_batch_add_up_to_the_whole(statistic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    whole, in_parts = (statistic(5, torch.device("cpu")) for _ in range(2))
    whole.add(inputs)
    monkeypatch.setattr(statistics, "AT_ONCE", 11)  # two tokens
    in_parts.add(inputs)
    in_parts.add(inputs[:0])
    for found in (whole, in_parts):
        found.sum_over_ranks(3)
    torch.testing.assert_close(in_parts.squared_norm, whole.squared_norm, rtol=1e-7, atol=0)
    torch.testing.assert_close(whole.squared_norm, inputs.double().square().sum((0, 1)).float() / 3, rtol=1e-6, atol=0)
    if statistic is InputMoments:
        assert (in_parts.tokens, whole.tokens) == (21, 21)
        torch.testing.assert_close(in_parts.variance, whole.variance, rtol=1e-6, atol=0)
        torch.testing.assert_close(in_parts.total, whole.total, rtol=1e-6, atol=0)
