"""Structures: a model without some blocks, heads and channels is the model with these switched off."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXTURES, tiny
from transformers import AutoModelForCausalLM

from besa_exp.blocks.block import discover_blocks
from besa_exp.blocks.linears import replaced_forwards
from besa_exp.checkpoints.files import save_model
from besa_exp.checkpoints.narrowed_config import dimensions_of, narrowed_config, width_problems
from besa_exp.checkpoints.narrowed_model import (
    costs_of_model,
    dimensions_of_model,
    narrow_folder,
    narrowed_model,
    padded_model,
)
from besa_exp.checkpoints.narrowed_tensors import Narrowing
from besa_exp.checkpoints.structure import Structure, from_json, to_json

INPUT_IDS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(3))
CUT_HEADS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt_oss")
CUT_CHANNELS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "stablelm", "gpt_neox")
CUT_CHANNELS += ("opt", "opt_350m", "falcon", "gpt2")
CHANNELS = tuple(channel for channel in range(48) if channel % 5)


def dense(family, monkeypatch=None, **changes):
    table = FAMILIES if family in FAMILIES else MIXTURES
    blocks = {"num_hidden_layers": 3} | ({"n_layer": 3} if family in ("gpt2", "bloom") else {})
    if monkeypatch:
        kinds = table[family].get("layer_types")
        blocks |= {"layer_types": [*kinds, kinds[0]]} if kinds else {}
        monkeypatch.setitem(table, family, table[family] | blocks | changes)
    model = tiny(family)
    with torch.no_grad():  # biases and norms are 0 and 1 in new models: what is cut wrongly would not show
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("_bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def with_zeros(narrowing, tensor, name):
    """The tensor with zeros where the structure removes rows and columns, in its own shape."""
    if (found := narrowing.cut(name)) is None:
        return tensor
    axis, kept = found
    return torch.zeros_like(tensor).index_copy(axis, kept, tensor.index_select(axis, kept))


@torch.no_grad()
def switched_off(model, structure):
    """Logits of the dense model with the removed blocks the identity and the removed columns of o and down zero."""
    path, modules = discover_blocks(model)
    narrowing = Narrowing(structure, dimensions_of_model(model), path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if narrowing.new_name(name) is not None:
            tensor.copy_(with_zeros(narrowing, tensor, name))
    gone = [module for place, module in enumerate(modules) if place not in structure.blocks]
    tuples = model.config.model_type in ("falcon", "bloom", "gpt_neox", "gpt2", "stablelm")
    try:
        outputs = [lambda hidden, *args, **kwargs: hidden] * len(gone)
        try:
            with replaced_forwards(gone, outputs):
                return model(INPUT_IDS, use_cache=False).logits
        except (IndexError, ValueError, AttributeError):
            assert tuples
            with replaced_forwards(gone, [lambda hidden, *args, **kwargs: (hidden,)] * len(gone)):
                return model(INPUT_IDS, use_cache=False).logits
    finally:
        model.load_state_dict(before)


def logits_of(model):
    with torch.no_grad():
        return model(INPUT_IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_without_a_block_every_family_is_itself_with_that_block_off_to_the_last_bit(family, monkeypatch, tmp_path):
    model = dense(family, monkeypatch)
    removed = 0 if family in ("gemma2", "gemma3_text", "gpt_oss") else 1  # whose kinds of blocks alternate
    structure = Structure(tuple(block for block in range(3) if block != removed))
    small = narrowed_model(model, structure)
    expected = switched_off(model, structure)
    assert not torch.allclose(expected, logits_of(model), atol=1e-3)
    assert torch.equal(logits_of(small), expected)
    assert small.num_parameters() == structure.parameters_left(costs_of_model(model), dimensions_of_model(model))
    save_model(small, None, tmp_path / "small", "card")
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    again, loading = read
    assert not any(loading[told] for told in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits_of(again), expected)
    given = INPUT_IDS[:1, :6]
    told = [
        again.generate(given, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=c) for c in (True, False)
    ]
    assert torch.equal(*told)


def test_without_its_only_block_of_a_kind_a_model_holds_nothing_of_that_kind(monkeypatch, tmp_path):
    """The rotary table of global attention was saved, which the smaller model's class has no place for."""
    model, structure = dense("gemma3_text", monkeypatch), Structure((0, 2))
    save_model(narrowed_model(model, structure), None, tmp_path / "small", "card")
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not read[1]["unexpected_keys"]
    assert torch.equal(logits_of(read[0]), switched_off(model, structure))


@pytest.mark.parametrize("family", CUT_HEADS)
def test_without_a_group_of_heads_a_family_is_itself_with_that_group_off(family, monkeypatch, tmp_path):
    model = dense(family, monkeypatch)
    structure = Structure((0, 2), groups=((1,), (0,)))
    if family in ("gemma2", "gemma3_text", "gpt_oss", "qwen3_moe"):
        structure = replace(structure, blocks=(1, 2))
    assert_narrowed_is_switched_off(model, structure, tmp_path)


@pytest.mark.parametrize("family", CUT_CHANNELS)
def test_without_channels_a_family_is_itself_with_these_off(family, monkeypatch, tmp_path):
    changes = {"ffn_hidden_size": 48} if family == "falcon" else {"n_inner": 48} if family == "gpt2" else {}
    model = dense(family, monkeypatch, **changes)
    others = tuple(channel for channel in range(48) if channel % 5 != 1)[: len(CHANNELS)]
    assert_narrowed_is_switched_off(model, Structure((0, 1, 2), channels=(CHANNELS, others, CHANNELS)), tmp_path)


def assert_narrowed_is_switched_off(model, structure, tmp_path):
    small = narrowed_model(model, structure)
    expected = switched_off(model, structure)
    assert not torch.allclose(expected, logits_of(model), atol=1e-3)
    torch.testing.assert_close(logits_of(small), expected, rtol=1e-5, atol=2e-6)
    assert small.num_parameters() == structure.parameters_left(costs_of_model(model), dimensions_of_model(model))
    keeps_fp32 = model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict
    if keeps_fp32:  # what cannot be streamed is saved from memory
        save_model(small, None, tmp_path / "small", "card")
    else:
        save_model(model, None, tmp_path / "dense", "card")
        narrow_folder(tmp_path / "dense", structure, tmp_path / "small")
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    again, loading = read
    assert not any(loading[told] for told in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits_of(again), logits_of(small))
    if not keeps_fp32:
        assert from_json((tmp_path / "small" / "structure.json").read_text()) == structure


LLAMA = Structure((0, 1, 2), groups=((0,), (0, 1), (1,)), channels=(CHANNELS, CHANNELS[:7], CHANNELS[:20]))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_uneven_widths_are_refused_unless_they_are_asked_for_and_padding_changes_nothing(family, monkeypatch, tmp_path):
    model = dense(family, monkeypatch)
    with pytest.raises(ValueError, match=r"uneven widths, which no config can express; set structure\.shape=uniform"):
        narrowed_model(model, LLAMA)
    small = narrowed_model(model, LLAMA, uneven=True)
    padded = padded_model(small)
    assert padded_model(padded) is padded
    torch.testing.assert_close(logits_of(padded), logits_of(small), rtol=1e-6, atol=1e-6)
    save_model(padded, None, tmp_path / "padded", "card")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    assert (type(again), again.config.intermediate_size) == (type(model), len(CHANNELS))
    assert torch.equal(logits_of(again), logits_of(padded))
    left = LLAMA.parameters_left(costs_of_model(model), dimensions_of_model(model))
    nonzero = sum(int(parameter.count_nonzero()) for parameter in again.parameters())
    assert nonzero == left == small.num_parameters() < again.num_parameters()


IN_A_FRESH_PROCESS = """
import gc, sys
gc.disable()  # it would walk what is imported, again and again
import torch
from transformers import AutoModelForCausalLM
ids, *folders = sys.argv[1:]
ids = torch.load(ids)
for folder in folders:
    model, told = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    said = (model.generate(ids[:1, :6], max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=cached)
            for cached in (True, False))
    assert torch.equal(*said), folder
    torch.save((model(ids, use_cache=False).logits, model.num_parameters()), f"{folder}/out")
gc.freeze()
"""


def test_uneven_widths_load_with_their_modelling_file_in_a_fresh_process(monkeypatch, tmp_path):
    expected, counts = {}, {}
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        changes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4} if family == "llama" else {}
        model, folder = dense(family, monkeypatch, **changes), tmp_path / family
        structure = replace(LLAMA, groups=((0, 1, 3), (0,), (1, 2))) if changes else LLAMA  # 6 heads do not divide 32
        small = narrowed_model(model, structure, uneven=True)
        save_model(small, None, folder, "card")
        expected[folder] = switched_off(model, structure)
        torch.testing.assert_close(logits_of(small), expected[folder], rtol=1e-5, atol=2e-6)
        counts[folder] = structure.parameters_left(costs_of_model(model), dimensions_of_model(model))
    torch.save(INPUT_IDS, tmp_path / "ids")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path / "ids"), *map(str, expected)]
    subprocess.run(command, check=True)
    for folder, logits in expected.items():
        found, count = torch.load(folder / "out")
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=2e-6)
        assert count == counts[folder]


def test_a_llama_whose_heads_no_longer_divide_its_hidden_size_becomes_the_equal_mistral(monkeypatch, tmp_path):
    model = dense("llama", monkeypatch, num_key_value_heads=4)
    structure = Structure((0, 1, 2), groups=((0, 1, 3),) * 3)
    assert_narrowed_is_switched_off(model, structure, tmp_path)
    told = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (told["model_type"], told["num_attention_heads"], told["head_dim"]) == ("mistral", 3, 8)
    assert told["architectures"] == ["MistralForCausalLM"]
    assert told["sliding_window"] is None
    biased = model.config.to_dict() | {"attention_bias": True}
    with pytest.raises(ValueError, match="cannot be saved with attention_bias=true; keep a number of heads that div"):
        narrowed_config(biased, structure)


def test_lists_by_layer_and_numbers_of_layers_follow_the_blocks():
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "layer_types": [*"abcdef"],
        "mlp_only_layers": [0, 3, 4],
        "max_window_layers": 4,
        "decoder_sparse_step": 1,
        "eos_token_id": [1, 2, 3, 4, 5, 6],
    }
    told = narrowed_config(config, Structure((1, 3, 5)))
    assert told["num_hidden_layers"] == 3
    assert told["layer_types"] == ["b", "d", "f"]
    assert told["mlp_only_layers"] == [1]
    assert told["max_window_layers"] == 2
    assert told["eos_token_id"] == [1, 2, 3, 4, 5, 6]
    assert narrowed_config({"model_type": "mpt", "n_layers": 3, "d_model": 32}, Structure((0, 2)))["n_layers"] == 2
    smollm = config | {"no_rope_layers": [1, 1, 1, 0, 1, 1], "no_rope_layer_interval": 4}  # the list wins
    assert narrowed_config(smollm, Structure((1, 3, 5)))["no_rope_layers"] == [1, 0, 1]
    with pytest.raises(ValueError, match="no_rope_layer_interval=4"):
        narrowed_config(config | {"no_rope_layer_interval": 4}, Structure((1, 3, 5)))
    assert narrowed_config({"text_config": config, "vision_config": {"num_hidden_layers": 6}}, Structure((1,)))[
        "vision_config"
    ] == {"num_hidden_layers": 6}


def test_fewer_heads_state_their_number_and_the_width_of_a_head():
    config = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 8, "hidden_size": 64}
    told = narrowed_config(config, Structure((0,), groups=((0, 2, 5, 6),)))
    assert (told["num_attention_heads"], told["num_key_value_heads"], told["head_dim"]) == (4, 4, 8)
    grouped = narrowed_config(config | {"num_key_value_heads": 4}, Structure((0,), groups=((1, 3),)))
    assert (grouped["num_attention_heads"], grouped["num_key_value_heads"], grouped["head_dim"]) == (4, 2, 8)
    assert grouped["model_type"] == "llama"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers=2 .* depends on a block's place"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2 .* depends on a block's place"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"per_layer_config": {"1": {}}}, "per_layer_config"),
        ({"strange_layer_rule": 3}, "strange_layer_rule=3 .* is not known here; keep all blocks"),
        ({"layer_types": ["full_attention"]}, "layer_types .* lists 1 of 3 blocks"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder"),
    ],
)
def test_what_depends_on_a_blocks_place_is_refused(changes, reason):
    config = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
    with pytest.raises(ValueError, match=reason):
        narrowed_config(config | changes, Structure((0, 2)))
    if "is_encoder_decoder" not in changes and "layer_types" not in changes:
        narrowed_config(config | changes, Structure((0, 1, 2)))


def test_a_block_that_would_become_another_kind_is_refused(monkeypatch):
    model = dense("gemma2", monkeypatch)
    del model.config.layer_types  # as an old config, from which transformers derives them by place
    with pytest.raises(ValueError, match=r"block 1 would become another kind of block in place 0: self_attn has"):
        narrowed_model(model, Structure((1, 2)))


@pytest.mark.parametrize(
    ("family", "groups", "channels", "reason"),
    [
        ("opt", True, False, "its head size is the hidden size over the number of heads"),
        ("olmo2", True, False, "norms queries and keys over all heads together"),
        ("bloom", False, True, "four times the hidden size"),
        ("mixtral", False, True, "mixtures of experts, whose channels cannot be removed"),
        ("granite", True, True, "which rows of granite belong to a head or a channel is not known here"),
    ],
)
def test_widths_that_a_family_cannot_give_up_are_refused_with_the_reason(family, groups, channels, reason):
    problems = width_problems({"model_type": family}, groups, channels)
    assert len(problems) == 1
    assert reason in problems[0]
    assert width_problems({"model_type": family}, groups=False, channels=False) == []


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        (Structure((0, 3)), "keeps blocks number 3; there are 3, from 0"),
        (Structure(()), "keeps none of the 3 blocks; at least one must stay"),
        (Structure((1, 0)), r"the kept blocks must ascend without repeats, not \[1, 0\]"),
        (Structure((0, 1), groups=((0,), ())), "keeps none of the 2 groups of heads of block 1"),
        (Structure((0, 1), channels=((0,),)), "lists the channels of 1 blocks and keeps 2 blocks"),
        (Structure((2,), channels=((48,),)), "keeps channels of block 2 number 48; there are 48"),
    ],
)
def test_a_structure_of_another_model_is_refused(structure, reason, monkeypatch):
    with pytest.raises(ValueError, match=reason):
        narrowed_model(dense("llama", monkeypatch), structure)


def test_a_structure_is_read_back_and_bad_files_are_refused(monkeypatch):
    dimensions = dimensions_of(
        {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
    )
    for structure in (LLAMA, Structure((0, 2)), Structure((1,), channels=((5, 9),))):
        assert from_json(to_json(structure, dimensions)) == structure
    for text, reason in (
        ("{}", "cannot be read as a structure"),
        ("[", "cannot be read"),
        ('{"format_version": 2, "blocks": []}', "format 2"),
    ):
        with pytest.raises(ValueError, match=reason):
            from_json(text)
