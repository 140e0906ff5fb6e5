"""A streamed model computes what the whole one does, and holds one block's weights at a time."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, MIXTURES, tiny
from safetensors.torch import load_file, save_file
from tiny_llama import INPUT_IDS
from transformers import AutoModelForCausalLM, GptOssForCausalLM

from besa_exp.blocks.block import capture_blocks, discover_blocks, embed
from besa_exp.blocks.replay_check import check_replay
from besa_exp.checkpoints.load import LoadedModel
from besa_exp.checkpoints.streaming import open_streamed, streamed_sources
from besa_exp.checkpoints.tensor_sources import as_saved, stored_tensors
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.evaluation.simulated_speed import simulate_model
from besa_exp.evaluation.streamed import streamed_perplexity

CPU = torch.device("cpu")
STREAMED = sorted(FAMILIES | MIXTURES)


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def weights_in_memory(modules) -> int:
    return sum(p.numel() for module in modules for p in module.parameters() if p.device.type != "meta")


@pytest.mark.parametrize("family", STREAMED)
def test_streamed_blocks_give_the_whole_models_hidden_states_one_block_in_memory_at_a_time(family, tmp_path):
    whole = tiny(family)
    own = whole(INPUT_IDS, output_hidden_states=True).hidden_states
    model, weights = open_streamed(saved(whole, tmp_path, max_shard_size="20KB"), "auto", CPU, False)
    modules = discover_blocks(model)[1]
    assert len({stored.file for stored in stored_tensors(tmp_path).values()}) > 1
    assert weights_in_memory(modules) == 0
    blocks = capture_blocks(model, INPUT_IDS)
    hidden = embed(model, blocks, INPUT_IDS, 2)
    for index, block in enumerate(weights.resident(blocks)):
        assert weights_in_memory(modules) == sum(p.numel() for p in block.module.parameters())
        if index == 0:
            check_replay(model, blocks[:1], INPUT_IDS)
        torch.testing.assert_close(hidden, own[index], rtol=1e-5, atol=1e-5)
        hidden = block.outputs(hidden, 2, out=hidden)
    assert weights_in_memory(modules) == 0
    expected = perplexity(whole, INPUT_IDS, 24, 2).value
    assert streamed_perplexity(model, weights, INPUT_IDS, 2).value == pytest.approx(expected, rel=1e-5)
    with weights.on_demand(model):
        assert perplexity(model, INPUT_IDS, 24, 2).value == pytest.approx(expected, rel=1e-5)
    assert weights_in_memory(modules) == 0


def test_the_rest_of_a_streamed_model_is_the_saved_one_and_ties_stay(tmp_path):
    whole = tiny("gemma2")
    model, _ = open_streamed(saved(whole, tmp_path), "bfloat16", CPU, False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, whole.model.embed_tokens.weight.bfloat16())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "qwen3_moe", "olmoe", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_tensors_are_those_that_from_pretrained_makes_of_the_files(family, dtype, tmp_path):
    saved(tiny(family), tmp_path, max_shard_size="20KB")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    model, weights = open_streamed(tmp_path, dtype, CPU, False)
    found = model.state_dict() | weights.read("")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "qwen3_moe"])
def test_what_is_saved_of_a_block_is_what_was_stored(family, tmp_path):
    saved(tiny(family), tmp_path)
    model, weights = open_streamed(tmp_path, "auto", CPU, False)
    stored = load_file(tmp_path / "model.safetensors")
    path, modules = discover_blocks(model)
    parts = [weights.read(f"{path}.{index}.") for index in range(len(modules))] + [weights.read_outside(f"{path}.")]
    assert max(map(len, parts)) < len(stored)
    found = {name: tensor for part in parts for name, tensor in as_saved(model, part).items()}
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_a_checkpoint_without_the_base_models_prefix_and_with_old_buffers_is_streamed(tmp_path):
    whole = tiny("gpt2")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in whole.state_dict().items()}
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if name != "lm_head.weight"}
    saved(whole, tmp_path)
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "model.safetensors", {"format": "pt"})
    model, weights = open_streamed(tmp_path, "auto", CPU, False)
    blocks = capture_blocks(model, INPUT_IDS)
    for block in weights.resident(blocks):
        own = whole.transformer.h[block.index].state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in block.module.state_dict().items())
    assert model.state_dict()["lm_head.weight"].data_ptr() == model.state_dict()["transformer.wte.weight"].data_ptr()


def test_a_family_that_keeps_modules_in_fp32_is_refused_in_the_dtypes_where_it_does(tmp_path, monkeypatch):
    """GPT-OSS its norms in fp16 alone; DeepSeek-V3 and others what they name as strict in bf16 too."""
    model = saved(tiny("gpt_oss"), tmp_path)
    with pytest.raises(ValueError, match="GptOssForCausalLM in float16 keeps some modules in fp32"):
        open_streamed(model, "float16", CPU, False)
    monkeypatch.setattr(GptOssForCausalLM, "_keep_in_fp32_modules_strict", ["router"], raising=False)
    with pytest.raises(ValueError, match="GptOssForCausalLM in bfloat16 keeps some modules in fp32"):
        open_streamed(model, "bfloat16", CPU, False)


def test_a_mixture_whose_files_lack_an_expert_is_refused(tmp_path):
    whole = tiny("mixtral")
    stored = stored_tensors(saved(whole, tmp_path))
    assert streamed_sources(whole, stored)
    del stored["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    with pytest.raises(ValueError, match=r"in another shape model\.layers\.1\.mlp\.experts\.down_proj"):
        streamed_sources(whole, stored)


def test_a_model_whose_files_name_other_tensors_is_refused_with_the_names(tmp_path):
    saved(tiny("llama"), tmp_path)
    stored = stored_tensors(tmp_path)
    stored["model.layers.0.mlp.fused.weight"] = stored["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"also hold model\.layers\.0\.mlp\.fused\.weight"):
        streamed_sources(tiny("llama"), stored)
    del stored["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"lack model\.layers\.0\.mlp\.up_proj\.weight"):
        streamed_sources(tiny("llama"), stored)


def test_simulated_cycles_of_a_streamed_model_are_those_of_the_whole_one(tmp_path):
    whole = tiny("llama")
    whole.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
    model, weights = open_streamed(saved(whole, tmp_path), "auto", CPU, False)
    found = simulate_model(LoadedModel(model, None, weights, tmp_path))
    assert found == simulate_model(LoadedModel(whole, None, None, tmp_path))
    assert found["linears"]["mlp.up_proj"]["sparsity"] == 0.25
    assert found["linears"]["mlp.down_proj"]["speed_up"] == 1
