"""A model's config as transformers reads it, with replacements for what cannot be used on this machine.

Whole, streamed and weightless models are built from it, so that they are one model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_utils import get_state_dict_dtype, load_state_dict

from besa_exp.checkpoints.inspect import weight_files

ATTENTIONS = (None, "eager", "sdpa")  # what PyTorch itself computes; all else is a package or a GPU's


def read_config(folder: Path, trust_remote_code: bool) -> tuple[PreTrainedConfig, list[str]]:
    """The config, and a sentence for each replacement: attention by another package (flash attention) becomes what
    transformers chooses here. Outputs are never bare tuples, and hold neither attention weights nor hidden states:
    nothing reads them, and transformers saves no config that asks for the former. OSError, ValueError: it cannot be
    read."""
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    config.return_dict = True
    for part in (config, config.get_text_config()):
        part.output_attentions, part.output_hidden_states = False, False
    asked = config._attn_implementation
    if asked in ATTENTIONS:
        return config, []
    config._attn_implementation = None
    return config, [f"its config.json asks for {asked}; attention is computed by PyTorch's own instead"]


def dtype_of(config: PreTrainedConfig, wanted: str, folder: Path) -> torch.dtype:
    """What the weights are computed in: as `wanted`, or for auto what the config says or, where it says nothing, the
    dtype of the first weights; fp32 where there are none."""
    said = config.dtype if wanted == "auto" else wanted
    if said is not None:
        return getattr(torch, said) if isinstance(said, str) else said
    files, problems = weight_files(folder)
    return torch.float32 if problems else get_state_dict_dtype(load_state_dict(str(files[0]), map_location="meta"))
