"""What a token costs when a model is scored: one batch through a model of one block, as perplexity takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from besa_exp.blocks.block import discover_blocks
from besa_exp.checkpoints.streaming import give_back_memory
from besa_exp.dry_run.block_probe import BlockProbe
from besa_exp.dry_run.meters import PeakMemory, seconds_of
from besa_exp.evaluation.batches import rows_at_once, tokens_at_once
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.settings import EvaluatorSettings

SLOW = 1.0  # seconds that a batch may take; it is made smaller where it takes longer


@dataclass(frozen=True)
class EvaluationCost:
    """Seconds of a token in a block and in all that is outside the blocks; the tokens of a batch and the bytes that one
    holds beyond weights."""

    in_block: float
    outside: float
    tokens: int
    held: int


def evaluation_cost(probe: BlockProbe, settings: EvaluatorSettings, window: int) -> EvaluationCost:
    """Measured on one batch of windows of `window` tokens, or a part of it on a slow device."""
    model = probe.model
    tokens = tokens_at_once(model)
    rows = rows_at_once(tokens, window) if settings.batch_size == "auto" else settings.batch_size
    batch = rows * window
    tried, length = 1, min(window, 128)
    slowness = _batch_seconds(probe, tried, length) / (tried * length)
    if slowness * batch <= SLOW:
        tried, length = rows, window
    else:
        length = min(window, max(length, int(SLOW / slowness)))
    give_back_memory()
    with PeakMemory(probe.device) as memory:
        before = memory.now()
        whole = min(_batch_seconds(probe, tried, length) for _ in range(2))
        held = memory.lap() - before
    in_block = probe.forward_seconds(tried, length)
    measured = tried * length
    return EvaluationCost(
        in_block=in_block / measured,
        outside=max(0.0, whole - in_block * len(discover_blocks(model)[1])) / measured,
        tokens=tokens,
        held=max(0, held) * batch // measured,
    )


def _batch_seconds(probe: BlockProbe, rows: int, length: int) -> float:
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return seconds_of(probe.device, lambda: perplexity(probe.model, ids, length, rows))
