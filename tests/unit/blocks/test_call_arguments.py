"""Blocks are called on their own only where their arguments depend on the batch's shape; other models are told so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.call_arguments import NotAlone
from besa_exp.blocks.head import head_of
from besa_exp.blocks.replay_check import check_replay
from besa_exp.checkpoints.streaming import open_streamed
from besa_exp.dry_run.probe import cut_down
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.evaluation.streamed import streamed_perplexity

INPUT_IDS = torch.randint(3, 64, (5, 24), generator=torch.Generator().manual_seed(3))
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES |= {"num_hidden_layers": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
ALTUP = {
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "intermediate_size": [48, 48],
    "activation_sparsity_pattern": [0.0, 0.0],
}
ALTUP |= {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}
GPT1 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ODD = {
    "gemma4_text": (
        PER_LAYER | {"intermediate_size": 48},
        r"gives its blocks per_layer_input, which depends on the tok",
    ),
    "gemma3n_text": (PER_LAYER | ALTUP, r"states between .* \[2, 2, 24, 32\] for \[2, 24\] tokens"),
    "rwkv": ({"context_length": 64, "attention_hidden_size": 32}, "does more with what its blocks return"),
    "openai-gpt": (GPT1, None),
}


def odd_model(family):
    try:
        config = AutoConfig.for_model(family, **(SIZES | {"pad_token_id": 0} | ODD[family][0]))
    except ValueError:
        pytest.skip(f"this transformers does not know {family}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("family", ODD)
def test_a_model_whose_blocks_cannot_be_called_on_their_own_is_refused_with_the_reason(family):
    model, reason = odd_model(family), ODD[family][1]
    blocks = capture_blocks(model, INPUT_IDS)
    if reason is None:
        check_replay(model, blocks, INPUT_IDS[-2:])
        return
    with pytest.raises(NotAlone, match=reason):
        blocks[0].arguments(2)


@pytest.mark.parametrize("family", sorted(ODD.keys() - {"rwkv"}))  # some of its modules stay in fp32: never streamed
def test_the_streamed_perplexity_of_such_a_model_is_the_whole_ones_all_the_same(family, tmp_path):
    whole = odd_model(family)
    whole.save_pretrained(tmp_path)
    expected = perplexity(whole, INPUT_IDS, 24, 2).value
    model, weights = open_streamed(tmp_path, "auto", torch.device("cpu"), False)
    assert streamed_perplexity(model, weights, INPUT_IDS, 2).value == pytest.approx(expected, rel=1e-5)


def test_a_dry_run_sees_what_depends_on_the_tokens_in_a_model_without_weights():
    config = odd_model("gemma4_text").config
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config)
    blocks = capture_blocks(cut_down(empty, torch.device("cpu")), torch.zeros(2, 12, dtype=torch.int64))
    with pytest.raises(NotAlone, match="gives its blocks per_layer_input"):
        blocks[0].arguments(2)


class Toy(nn.Module):
    """A decoder that is odd in one way: what its blocks are given, write, return, or what its head is made of."""

    def __init__(self, oddity: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.oddity = oddity
        self.embed = nn.Embedding(64, 8)
        self.layers = nn.ModuleList(ToyBlock(oddity) for _ in range(3))
        text = SimpleNamespace(pad_token_id=0, bos_token_id=1, eos_token_id=[2])
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids, use_cache):
        hidden = first = self.embed(input_ids)
        shape, shared, returned = torch.arange(input_ids.shape[1]), {}, None
        masked = (input_ids == 0) if self.oddity == "mask" else None
        for layer in self.layers:
            hidden, more = layer(
                hidden, {"rope": shape, "given": [first]} if self.oddity == "given" else shape, masked, shared, returned
            )
            returned = more if self.oddity == "returned" else None
        logits = hidden @ self.embed.weight.T
        return SimpleNamespace(logits=logits + first.sum(dim=-1, keepdim=True) if self.oddity == "head" else logits)


class ToyBlock(nn.Module):
    def __init__(self, oddity: str) -> None:
        super().__init__()
        self.oddity, self.linear = oddity, nn.Linear(8, 8)

    def forward(self, hidden, places, masked, shared, returned):
        if self.oddity == "shared":
            shared.setdefault("keys", hidden)
            hidden = hidden + shared["keys"]
        hidden = hidden if returned is None else hidden + returned
        return self.linear(hidden), hidden


@pytest.mark.parametrize(
    ("oddity", "reason"),
    [
        ("given", "gives its blocks places, which depends on the tokens"),
        ("mask", "gives its blocks masked, which depends on the tokens"),  # only where there are special ones
        ("shared", "hand on more than hidden states: they write into shared"),
        ("returned", r"hand on more than hidden states \(returned\)"),
        ("none", None),
        ("head", None),
    ],
)
def test_each_way_in_which_a_block_knows_more_than_hidden_states_and_shape_is_found(oddity, reason):
    model = Toy(oddity)
    blocks = capture_blocks(model, INPUT_IDS)
    if reason is None:
        check_replay(model, blocks, INPUT_IDS[-2:])
        return
    with pytest.raises(NotAlone, match=reason):
        check_replay(model, blocks, INPUT_IDS[-2:])


@pytest.mark.parametrize("oddity", ["head", "none"])
def test_a_head_that_looks_at_the_tokens_is_refused_where_it_is_given_others(oddity):
    model = Toy(oddity)
    blocks = capture_blocks(model, INPUT_IDS)
    if oddity == "none":
        hidden = embed(model, blocks, INPUT_IDS, 5)
        torch.testing.assert_close(head_of(model, blocks, INPUT_IDS)(hidden), hidden @ model.embed.weight.T)
        return
    with pytest.raises(NotAlone, match="computes its logits from the tokens as well"):
        head_of(model, blocks, INPUT_IDS)
