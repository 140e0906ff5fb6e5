"""Measured 2:4 speed: n/a with the reason where the device has no such products, two times and their quotient there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny
from tiny_llama import tiny_llama

from besa_exp.blocks.block import capture_blocks
from besa_exp.checkpoints.load import LoadedModel
from besa_exp.display.rows import cost_table
from besa_exp.errors import Unavailable
from besa_exp.evaluation.cost import check_device, counts_of, is_two_of_four, measure_model
from besa_exp.evaluation.scores import evaluate
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


def test_what_a_model_costs_is_counted_in_the_literal_numbers_of_its_shapes():
    sizes = {"hidden_size": 32, "intermediate_size": 40, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    model = tiny_llama(num_hidden_layers=3, **sizes)
    linears = 3 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 40)
    norms = 3 * 2 * 32 + 32
    tied = model.config.tie_word_embeddings
    parameters = linears + norms + 64 * 32 * (1 if tied else 2)
    counts = counts_of(model, 20)
    assert counts == {
        "parameters": parameters,
        "bytes": 4 * parameters,
        "flops_per_token": 2 * (linears + 64 * 32) + 4 * 10 * 3 * 32,
        "cache_bytes_per_token": 3 * 2 * 16 * 4,
        "dtype": "float32",
        "prompt_tokens": 10,
    }
    assert counts_of(model.half(), 20)["bytes"] == 2 * parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_of_a_token_is_that_of_the_familys_real_cache(family):
    model = tiny(family)
    layers = model(torch.arange(6)[None] + 3, use_cache=True).past_key_values.layers
    held = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))
    assert counts_of(model, 20)["cache_bytes_per_token"] == held / 6


def test_of_a_mixtures_experts_those_that_run_are_counted():
    model = tiny("mixtral")
    config: Any = model.config
    (block, *_) = blocks = capture_blocks(model, torch.empty(0, 0, dtype=torch.long))
    kept = {name: linear.weight.numel() for name, linear in block.linears.items()}
    experts = sum(numel for name, numel in kept.items() if "experts" in name)
    passed = sum(kept.values()) - experts + experts * config.num_experts_per_tok // config.num_local_experts
    head = config.vocab_size * config.hidden_size
    width = config.hidden_size  # heads times the size of a head
    assert 0 < passed < sum(kept.values())
    assert counts_of(model, 0)["flops_per_token"] == 2 * (len(blocks) * passed + head)
    assert counts_of(model, 2)["flops_per_token"] - counts_of(model, 0)["flops_per_token"] == 4 * len(blocks) * width


def test_prefill_and_decoding_are_timed_for_one_and_eight_sequences_and_shown():
    settings = EvaluatorSettings("speed", speed=True)
    cost = evaluate(loaded(tiny_llama()), settings, True, 0, lambda text: None).to_dict()["cost"]
    assert cost["prompt_tokens"] + cost["decoded_tokens"] <= tiny_llama().config.max_position_embeddings
    for kind in ("prefill", "decode"):
        speeds = cost[f"{kind}_tokens_per_second"]
        assert set(speeds) == {"1", "8"}
        assert min(speeds.values()) > 0
    rows = cost_table({"cost": cost, "dense": {"cost": cost | {"parameters": 7}}})[1]
    assert rows[1] == ("parameters", "7", f"{cost['parameters']:,}")
    assert [row[0] for row in rows[-2:]] == ["decode tokens/s, batch 1", "decode tokens/s, batch 8"]
    assert cost_table({})[1] == []
