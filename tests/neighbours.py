"""Recorded runs of neighbouring methods' codes: the model, its tokens, masks of packed bits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from besa_exp.blocks.block import Block
from besa_exp.checkpoints.structure import Dimensions
from besa_exp.methods.structure.widths import masked


def recorded(shared: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the JSON file of a method says, and its tensors, where it has any."""
    folder = shared / "golden" / "neighbours"
    tensors = folder / f"{name}.safetensors"
    return json.loads((folder / f"{name}.json").read_text()), load_file(tensors) if tensors.is_file() else {}


def recorded_model(shared: Path, blocks: int | None = None) -> Any:
    """In fp32; the first `blocks` alone where given."""
    model = AutoModelForCausalLM.from_pretrained(shared / "golden" / "neighbours" / "model", dtype=torch.float32)
    if blocks:
        model.model.layers = model.model.layers[:blocks]
        model.config.num_hidden_layers = blocks
    return model.eval().requires_grad_(False)


def recorded_tokens(shared: Path) -> tuple[Tensor, Tensor]:
    """Calibration and test tokens."""
    tokens = load_file(shared / "golden" / "neighbours" / "tokens.safetensors")
    return tokens["input_ids"].long(), tokens["test_input_ids"].long()


def unpacked(bits: Tensor, shape: Any) -> Tensor:
    """A mask of packed bits."""
    size = torch.Size(shape)
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=size.numel())).bool().view(size)


def test_nll(model: Any, ids: Tensor) -> float:
    """Mean cross entropy of the following token."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


test_nll.__test__ = False  # type: ignore[attr-defined]


@contextmanager
def all_masked(blocks: Sequence[Block], groups: Tensor, channels: Tensor, dimensions: Dimensions) -> Iterator[None]:
    """The whole model under masks [block group] and [block channel]."""
    with ExitStack() as stack:
        for block, of_groups, of_channels in zip(blocks, groups, channels, strict=True):
            stack.enter_context(masked(block, of_groups, of_channels, dimensions))
        yield
