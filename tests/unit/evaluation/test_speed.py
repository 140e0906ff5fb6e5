"""Measured 2:4 speed: n/a with the reason where the device has no such products, two times and their quotient there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_llama

from besa_exp.blocks.block import capture_blocks
from besa_exp.checkpoints.load import LoadedModel
from besa_exp.errors import Unavailable
from besa_exp.evaluation.scores import evaluate
from besa_exp.evaluation.speed import check_device, is_two_of_four, measure_model
from besa_exp.settings import EvaluatorSettings
from besa_exp.tensors.masks import keep_n_of_m


def loaded(model) -> LoadedModel:
    return LoadedModel(model, None, None, Path())


def test_on_a_cpu_the_results_say_that_speed_is_not_to_be_had_and_why():
    scores = evaluate(loaded(tiny_llama()), EvaluatorSettings("speed", speed=True), True, 0, lambda text: None)
    assert "the device is cpu" in scores.to_dict()["speed"]["unavailable"]
    assert scores.to_dict()["unavailable"]["speed"] == scores.speed["unavailable"]
    with pytest.raises(Unavailable, match="CUDA device of compute capability"):
        check_device(torch.device("cpu"), torch.float16)


def test_a_weight_is_two_of_four_only_if_every_group_is():
    importance = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)) + 0.1
    weight = importance * keep_n_of_m(importance, 2, 4)
    assert is_two_of_four(weight)
    assert is_two_of_four(torch.zeros(3, 8))
    assert not is_two_of_four(weight[:, :6])
    weight[4, 9:12] = 1
    assert not is_two_of_four(weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device of compute capability 8.0")
def test_on_a_device_with_2_of_4_products_both_are_timed_for_each_kind_of_linear():
    model = tiny_llama(hidden_size=256, intermediate_size=512).to("cuda", torch.float16)  # type: ignore[call-arg]
    with pytest.raises(Unavailable, match="is not 2:4"):
        measure_model(loaded(model))
    with torch.no_grad():
        for block in capture_blocks(model, torch.empty(0, 0, dtype=torch.long)):
            for linear in block.linears.values():
                linear.weight.mul_(keep_n_of_m(linear.weight.float().abs(), 2, 4))
    measured = measure_model(loaded(model))
    assert set(measured["linears"]) == set(block.linears)
    for row in measured["linears"].values():
        assert row["speed_up"] == pytest.approx(row["dense_seconds"] / row["sparse_seconds"])
        assert row["sparse_seconds"] > 0
