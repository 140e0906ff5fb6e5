"""Perplexity of a streamed model: each block is read once, and all windows pass through it before the next."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from besa_exp import distributed
from besa_exp.blocks import capture_blocks, embed
from besa_exp.errors import as_unavailable
from besa_exp.evaluation.batches import BatchSize, rows_at_once, tokens_at_once
from besa_exp.evaluation.perplexity import Perplexity, perplexity_of, sum_of_losses
from besa_exp.head import head_logits
from besa_exp.streaming import StreamedWeights


@torch.no_grad()
def streamed_perplexity(
    model: nn.Module, weights: StreamedWeights, windows: Int[Tensor, "window seq"], batch_size: BatchSize
) -> Perplexity:
    """As `perplexity`, of a model whose blocks are read from files. Holds the hidden states of all own windows."""
    size = rows_at_once(tokens_at_once(model), windows.shape[1]) if batch_size == "auto" else batch_size
    own = distributed.own_samples(windows)
    total = distributed.agreed(lambda: _sum(model, weights, own, size))
    return perplexity_of(float(distributed.all_sum(total)), windows, size)


def _sum(
    model: nn.Module, weights: StreamedWeights, windows: Int[Tensor, "window seq"], batch_size: int
) -> Float[Tensor, ""]:
    """The sum of the losses of all windows."""
    total = torch.zeros((), dtype=torch.float64)
    with as_unavailable():
        for ids, logits in streamed_logits(model, weights, windows, batch_size) if len(windows) else ():
            total += sum_of_losses(logits, ids).cpu()
    return total


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
        yield ids, head_logits(model, modules, ids, hidden[start : start + batch_size])
