"""A streamed model computes what the whole one does, and holds one block's weights at a time."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny
from test_blocks import INPUT_IDS

from besa_exp.blocks import capture_blocks, discover_blocks, embed
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.evaluation.simulated_speed import simulate_model
from besa_exp.evaluation.streamed import streamed_perplexity
from besa_exp.models import LoadedModel
from besa_exp.replay_check import check_replay
from besa_exp.streaming import cannot_stream, open_streamed, tensor_files

CPU = torch.device("cpu")
LOADED_WHOLE = {"gpt_neox", "mixtral", "qwen2_moe"}  # transformers saves some tensors under other names, or apart


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def weights_in_memory(modules) -> int:
    return sum(p.numel() for module in modules for p in module.parameters() if p.device.type != "meta")


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - LOADED_WHOLE))
def test_streamed_blocks_give_the_whole_models_hidden_states_one_block_in_memory_at_a_time(family, tmp_path):
    whole = tiny(family)
    own = whole(INPUT_IDS, output_hidden_states=True).hidden_states
    model, weights = open_streamed(saved(whole, tmp_path, max_shard_size="20KB"), "auto", CPU, False)
    modules = discover_blocks(model)[1]
    assert len(set(tensor_files(tmp_path).values())) > 1
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
    with weights.on_demand({block.name: block.module for block in blocks}):
        assert perplexity(model, INPUT_IDS, 24, 2).value == pytest.approx(expected, rel=1e-5)
    assert weights_in_memory(modules) == 0


def test_the_rest_of_a_streamed_model_is_the_saved_one_and_ties_stay(tmp_path):
    whole = tiny("gemma2")
    model, _ = open_streamed(saved(whole, tmp_path), "bfloat16", CPU, False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, whole.model.embed_tokens.weight.bfloat16())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", sorted(LOADED_WHOLE))
def test_a_family_saved_under_other_names_is_refused(family, tmp_path):
    with pytest.raises(ValueError, match="their names are not those of"):
        open_streamed(saved(tiny(family), tmp_path), "auto", CPU, False)


def test_a_model_whose_files_name_other_tensors_is_refused_with_the_names(tmp_path):
    saved(tiny("llama"), tmp_path)
    files = tensor_files(tmp_path)
    files["model.layers.0.mlp.fused.weight"] = files.pop("model.layers.0.mlp.up_proj.weight")
    assert "mlp.up_proj.weight" in str(cannot_stream(tiny("llama"), files))


def test_simulated_cycles_of_a_streamed_model_are_those_of_the_whole_one(tmp_path):
    whole = tiny("llama")
    whole.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
    model, weights = open_streamed(saved(whole, tmp_path), "auto", CPU, False)
    found = simulate_model(LoadedModel(model, None, weights, tmp_path))
    assert found == simulate_model(LoadedModel(whole, None, None, tmp_path))
    assert found["linears"]["mlp.up_proj"]["sparsity"] == 0.25
    assert found["linears"]["mlp.down_proj"]["speed_up"] == 1
