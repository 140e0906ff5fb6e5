"""Perplexity of a streamed model: each block is read once, and all windows pass through it before the next."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from besa_exp.blocks.block import capture_blocks, discover_blocks, embed
from besa_exp.blocks.call_arguments import NotAlone, check_unwritten
from besa_exp.blocks.head import head_logits
from besa_exp.checkpoints.streaming import StreamedWeights
from besa_exp.errors import as_unavailable
from besa_exp.evaluation.batches import BatchSize, rows_at_once, tokens_at_once
from besa_exp.evaluation.perplexity import Perplexity, perplexity_of, sum_of_losses
from besa_exp.machine import distributed

logger = logging.getLogger(__name__)


@torch.no_grad()
def streamed_perplexity(
    model: nn.Module, weights: StreamedWeights, windows: Int[Tensor, "window seq"], batch_size: BatchSize
) -> Perplexity:
    """As `perplexity`, of a model whose blocks are read from files. Holds the hidden states of all own windows.

    A model whose blocks cannot be called on their own is called as it is, each block read anew for each batch."""
    size = rows_at_once(tokens_at_once(model), windows.shape[1]) if batch_size == "auto" else batch_size
    own = distributed.own_samples(windows)
    total = distributed.agreed(lambda: _sum(model, weights, own, size))
    return perplexity_of(float(distributed.all_sum(total)), windows, size)


def _sum(
    model: nn.Module, weights: StreamedWeights, windows: Int[Tensor, "window seq"], batch_size: int
) -> Float[Tensor, ""]:
    """The sum of the losses of all windows."""
    with as_unavailable():
        try:
            return _sum_of(streamed_logits(model, weights, windows, batch_size) if len(windows) else ())
        except NotAlone as error:
            logger.warning("each block is read anew for each of the batches: %s", error)
        path, modules = discover_blocks(model)
        with weights.on_demand({f"{path}.{index}": module for index, module in enumerate(modules)}):
            batches = windows.split(batch_size)
            return _sum_of((ids, model(input_ids=ids, use_cache=False).logits) for ids in batches)


def _sum_of(batches: Iterable[tuple[Tensor, Tensor]]) -> Float[Tensor, ""]:
    """Of windows with their logits."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, logits in batches:
        total += sum_of_losses(logits, ids).cpu()
    return total


@torch.no_grad()
def streamed_logits(
    model: nn.Module, weights: StreamedWeights, windows: Int[Tensor, "window seq"], batch_size: int
) -> Iterator[tuple[Int[Tensor, "window seq"], Float[Tensor, "window seq vocabulary"]]]:
    """The windows, batch by batch, with the model's logits. NotAlone, before the first: the blocks cannot be called on
    their own."""
    blocks = capture_blocks(model, windows)
    modules = [block.module for block in blocks]
    hidden = embed(model, blocks, windows, batch_size)
    for block in weights.resident(blocks):
        hidden = block.outputs(hidden, batch_size, out=hidden)
    check_unwritten(
        model, modules, windows[:batch_size], [block.arguments(min(batch_size, len(windows))) for block in blocks]
    )
    for start in range(0, len(windows), batch_size):
        ids = windows[start : start + batch_size].to(hidden.device)
        yield ids, head_logits(model, modules, ids, hidden[start : start + batch_size])
