"""A tiny Llama as a GGUF file, by the `gguf` package's own writer, laid out as llama.cpp's converter does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from tiny_llama import tiny_llama
from tokenizers import pre_tokenizers

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "th", "the"]
MERGES = ["t h", "th e"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tied_llama() -> Any:
    """The model that `write_gguf` writes, two blocks of hidden size 64, its head tied to its embedding."""
    changes: dict[str, Any] = {"vocab_size": len(TOKENS), "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    return tiny_llama(**changes, rope_parameters={"rope_type": "default", "rope_theta": 100000.0})


def in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp rotates them: the two of a pair beside each other."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, packed: Type = Type.F32, architecture: str = "llama", extra: str | None = None) -> Path:
    """`packed`: how matrices in blocks are; the embedding is Q8_0 where they are not F32. `extra`: one more tensor."""
    model = tied_llama()
    writer = gguf.GGUFWriter(path, architecture)
    entries: list[Any] = [
        (writer.add_name, "Tiny"),
        (writer.add_license, "apache-2.0"),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 64),
        (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 96),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 100000.0),
        (writer.add_rope_dimension_count, 16),
        (writer.add_vocab_size, len(TOKENS)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, TOKENS),
        (writer.add_token_merges, MERGES),
        (writer.add_bos_token_id, 256),
        (writer.add_eos_token_id, 257),
        (writer.add_chat_template, CHAT_TEMPLATE),
    ]
    for add, value in entries:
        add(value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.float().numpy()
        if name.startswith("model.layers."):
            block, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                values = in_pairs(values, 4 if "q_proj" in part else 2)
            add_tensor(writer, f"blk.{block}.{NAMES[part]}.weight", values, packed)
        else:
            embedding = name == "model.embed_tokens.weight"
            kind = Type.Q8_0 if packed != Type.F32 else packed
            add_tensor(writer, "token_embd.weight" if embedding else "output_norm.weight", values, kind)
    if extra:
        add_tensor(writer, extra, np.ones(8, dtype=np.float32), Type.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, packed: Type) -> None:
    """Vectors stay F32."""
    if values.ndim == 1 or packed == Type.F32:
        writer.add_tensor(name, np.ascontiguousarray(values))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, packed), raw_dtype=packed)
