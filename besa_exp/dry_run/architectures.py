"""The sizes of the paper's models, for a dry run where neither a folder nor the hub has their config."""

from __future__ import annotations

from transformers import LlamaConfig, PreTrainedConfig

SIZES = {  # hidden, FFN, blocks, heads, key-value heads, context
    "huggyllama/llama-7b": (4096, 11008, 32, 32, 32, 2048),
    "huggyllama/llama-13b": (5120, 13824, 40, 40, 40, 2048),
    "huggyllama/llama-30b": (6656, 17920, 60, 52, 52, 2048),
    "huggyllama/llama-65b": (8192, 22016, 80, 64, 64, 2048),
    "meta-llama/Llama-2-7b-hf": (4096, 11008, 32, 32, 32, 4096),
    "meta-llama/Llama-2-13b-hf": (5120, 13824, 40, 40, 40, 4096),
    "meta-llama/Llama-2-70b-hf": (8192, 28672, 80, 64, 8, 4096),
}


def known_config(path: str) -> PreTrainedConfig | None:
    """Of the model that a preset names `path`; None: its sizes are not known here."""
    if path not in SIZES:
        return None
    hidden, ffn, blocks, heads, kv_heads, context = SIZES[path]
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        dtype="float16",
    )
