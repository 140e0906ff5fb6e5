"""The embedded model's shape, and its export as a plain model folder."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizer import VOCABULARY, WINDOW
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def model_config(tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace) -> LlamaConfig:
    special: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        pad_token_id=None,
        **special,
    )


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a plain model folder with bf16 weights."""
    nn.Module.to(model, torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("is_local", "local_files_only", "model_max_length"):  # of this machine; documents may be longer
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 knows no TokenizersBackend
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"exported {size / 2**20:.1f} MiB to {folder}")
