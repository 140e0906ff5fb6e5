"""The proof, at the start of every run, that blocks called on their own compute what the model computes with them."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from besa_exp.blocks import Block, Reached, embed
from besa_exp.errors import RunError
from besa_exp.linears import LOOKED_FOR, watch


@torch.no_grad()
def check_replay(model: nn.Module, blocks: list[Block], input_ids: Int[Tensor, "sample seq"]) -> None:
    """Prove that replaying `blocks`, the first ones or all, reproduces the model's own hidden states, and that their
    linears are called. RunError names the first block that does not, or a linear that is not."""
    own: list[Tensor] = []
    called: set[tuple[int, str]] = set()

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        own.append(output[0] if isinstance(output, tuple) else output)
        if len(own) == len(blocks):
            raise Reached

    hooks = []
    for block in blocks:
        note = partial(_note, called, block.index)
        hooks += [*watch(block.linears, note, note), block.module.register_forward_hook(record)]
    try:
        with suppress(Reached):
            model(input_ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    hidden = embed(model, blocks, input_ids, len(input_ids))
    for block, expected in zip(blocks, own, strict=True):
        hidden = block(hidden)
        error = (hidden.float() - expected.float()).norm() / expected.float().norm()
        if not error < 1e-3:
            raise RunError(
                f"{block.name}: replaying the block does not reproduce the model's own hidden states (relative error "
                f"{float(error):.2e}); the model calls its blocks in a way the block loop does not know. "
                "Please report the model's class and the transformers version."
            )
        _check_called(block, called)


def _note(called: set[tuple[int, str]], index: int, name: str, inputs: Tensor) -> None:
    called.add((index, name))


def _check_called(block: Block, called: set[tuple[int, str]]) -> None:
    idle = [
        name
        for name, linear in block.linears.items()
        if (block.index, name) not in called and (linear.expert is not None or not linear.of_mixture)
    ]
    if idle:
        raise RunError(
            f"{block.name}.{idle[0]}: {type(block.module).__name__} uses this weight without calling the module that "
            "holds it, so that its inputs cannot be observed; such a model cannot be pruned here. "
            f"Looked for {LOOKED_FOR}"
        )
