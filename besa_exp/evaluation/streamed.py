"""Perplexity of a streamed model: each block is read once, and all windows pass through it before the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from besa_exp import distributed
from besa_exp.blocks import capture_blocks, embed, replaced_forwards
from besa_exp.evaluation.batches import BatchSize, rows_at_once, tokens_at_once
from besa_exp.evaluation.perplexity import Perplexity, perplexity_of, sum_of_losses
from besa_exp.streaming import StreamedWeights


@torch.no_grad()
def streamed_perplexity(
    model: nn.Module, weights: StreamedWeights, windows: Int[Tensor, "window seq"], batch_size: BatchSize
) -> Perplexity:
    """As `perplexity`, of a model whose blocks are read from files. Holds the hidden states of all own windows."""
    size = rows_at_once(tokens_at_once(model), windows.shape[1]) if batch_size == "auto" else batch_size
    total = torch.zeros((), dtype=torch.float64)
    own = distributed.own_samples(windows)
    for ids, logits in streamed_logits(model, weights, own, size) if len(own) else ():
        total += sum_of_losses(logits, ids).cpu()
    return perplexity_of(float(distributed.all_sum(total)), windows, size)


@torch.no_grad()
def streamed_logits(
    model: nn.Module, weights: StreamedWeights, windows: Int[Tensor, "window seq"], batch_size: int
) -> Iterator[tuple[Int[Tensor, "window seq"], Float[Tensor, "window seq vocabulary"]]]:
    """The windows, batch by batch, with the model's logits."""
    blocks = capture_blocks(model, windows)
    hidden = embed(model, blocks, windows, batch_size)
    for block in weights.resident(blocks):
        hidden = block.outputs(hidden, batch_size, out=hidden)
    modules = [block.module for block in blocks]
    for start in range(0, len(windows), batch_size):
        ids = windows[start : start + batch_size].to(hidden.device)
        yield ids, _head(model, modules, ids, hidden[start : start + batch_size])


def _head(model: nn.Module, modules: list[nn.Module], ids: Tensor, hidden: Tensor) -> Tensor:
    """What the model makes of the last block's output: its own forward pass with stand-ins for the blocks, which return
    a tensor, or a tuple where the model wants one."""
    results: tuple[Any, ...] = (hidden, (hidden, None))
    for result in results:
        stand_ins = [lambda *args, result=result, **kwargs: result] * len(modules)
        with replaced_forwards(modules, stand_ins):
            try:
                logits = model(input_ids=ids, use_cache=False).logits
            except (TypeError, AttributeError, IndexError, RuntimeError, ValueError):
                if result is results[-1]:
                    raise
                continue
        if logits.shape[:2] == ids.shape:
            return logits
    raise AssertionError("the model makes no logits of its last block's output")
