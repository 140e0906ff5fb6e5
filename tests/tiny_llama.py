"""A random Llama and a byte tokenizer, both made on the spot: what the tests of calibration and evaluation score."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.evaluation.skipping import middle_of

BOS, EOS = "<s>", "</s>"
INPUT_IDS = torch.randint(1, 64, (5, 24), generator=torch.Generator().manual_seed(3))


def byte_tokenizer(adds_bos: bool = True, specials: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte; ids 256 and 257 are BOS and EOS where `specials`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if not specials:
        return PreTrainedTokenizerFast(tokenizer_object=backend)
    backend.add_special_tokens([BOS, EOS])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)


def tiny_llama(context: int = 64, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two blocks, hidden 64; logits far from uniform, so that a wrong position or mask shows. `changes`: of the config,
    `dtype` among them."""
    values: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.3,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(LlamaConfig(**(values | changes))).eval()


def middle_of_model(model: Any, input_ids: torch.Tensor) -> str:
    """The module between attention and FFN, as the first block has it."""
    blocks = capture_blocks(model, input_ids[:1])
    return middle_of(blocks[0], embed(model, blocks, input_ids[:1], 1))
