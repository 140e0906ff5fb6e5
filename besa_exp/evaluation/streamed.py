"""Scores of a streamed model: each block is read once, and all windows or questions pass through it before the next."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.call_arguments import NotAlone, check_unwritten
from besa_exp.blocks.head import head_logits
from besa_exp.checkpoints.streaming import StreamedWeights
from besa_exp.errors import as_unavailable
from besa_exp.evaluation.batches import BatchSize, rows_at_once, tokens_at_once
from besa_exp.evaluation.perplexity import OnCount, Perplexity, perplexity_of, sum_of_losses, uncounted
from besa_exp.machine import distributed

HELD_BYTES = 2.0**31  # hidden states of questions that pass through the blocks together
logger = logging.getLogger(__name__)


@torch.no_grad()
def streamed_perplexity(
    model: nn.Module,
    weights: StreamedWeights,
    windows: Int[Tensor, "window seq"],
    batch_size: BatchSize,
    on_count: OnCount = uncounted,
) -> Perplexity:
    """As `perplexity`, of a model whose blocks are read from files. Holds the hidden states of all own windows.

    A model whose blocks cannot be called on their own is called as it is, each block read again for each batch."""
    size = rows_at_once(tokens_at_once(model), windows.shape[1]) if batch_size == "auto" else batch_size
    own = distributed.own_samples(windows)
    total = distributed.agreed(lambda: _sum(model, weights, own, size, on_count))
    return perplexity_of(float(distributed.all_sum(total)), windows, size)


def _sum(
    model: nn.Module, weights: StreamedWeights, windows: Int[Tensor, "window seq"], batch_size: int, on_count: OnCount
) -> Float[Tensor, ""]:
    batches = windows.to(next(model.parameters()).device).split(batch_size) if len(windows) else ()
    with as_unavailable():
        try:
            return _sum_of(logits_of_batches(model, weights, batches, math.inf, on_count), batches)
        except NotAlone as error:
            logger.warning("the streamed model is read again for each batch: %s", error)
        with weights.on_demand(model):
            return _sum_of((model(input_ids=ids, use_cache=False).logits for ids in batches), batches)


def _sum_of(logits: Iterable[Tensor], batches: Sequence[Tensor]) -> Float[Tensor, ""]:
    total = torch.zeros((), dtype=torch.float64)
    for of_batch, ids in zip(logits, batches, strict=True):
        total += sum_of_losses(of_batch, ids).cpu()
    return total


@torch.no_grad()
def logits_of_batches(
    model: nn.Module,
    weights: StreamedWeights,
    batches: Sequence[Int[Tensor, "_window _seq"]],
    held_bytes: float,
    on_count: OnCount = uncounted,
) -> Iterator[Float[Tensor, "_window _seq vocabulary"]]:
    """The model's logits of each batch, in order; the batches may be of any shapes. Each block is read once for as many
    batches as have `held_bytes` of hidden states. NotAlone, before the first: the blocks cannot be called on their
    own."""
    config: Any = model.config
    state_bytes = config.get_text_config().hidden_size * next(model.parameters()).element_size()
    for group in _groups(batches, held_bytes / state_bytes):
        by_shape = {ids.shape: capture_blocks(model, ids) for ids in group}
        states = [embed(model, by_shape[ids.shape], ids, len(ids)) for ids in group]
        first = by_shape[group[0].shape]
        modules = [block.module for block in first]
        for depth, _ in enumerate(weights.resident(first)):
            for ids, hidden in zip(group, states, strict=True):
                by_shape[ids.shape][depth].outputs(hidden, len(ids), out=hidden)
            on_count(depth + 1, len(first), "blocks")
        check_unwritten(model, modules, group[0], [block.arguments(len(group[0])) for block in first])
        for ids, hidden in zip(group, states, strict=True):
            yield head_logits(model, modules, ids, hidden)


def _groups(batches: Sequence[Tensor], tokens: float) -> Iterator[list[Tensor]]:
    """Batches in order, as many together as have so many tokens, one at least."""
    group: list[Tensor] = []
    for ids in batches:
        if group and sum(other.numel() for other in group) + ids.numel() > tokens:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group
