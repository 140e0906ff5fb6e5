"""Perplexity by the protocol of the BESA paper (arXiv 2402.16880, Section 4; the same as GPTQ's and SparseGPT's).

The tokens are cut into consecutive windows; the last, partial one is dropped. Each window is scored by itself, without
the tokens before it, and its first token is not predicted:

    perplexity = exp( mean over windows, mean over i = 2 .. seq_len, of -log p(token_i | token_1 .. token_{i-1}) )
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Perplexity:
    """The value (infinite or NaN where the model's logits are), and what it was measured on: `num_tokens` predicted
    tokens, which is num_windows * (seq_len - 1)."""

    value: float
    num_tokens: int
    num_windows: int
    seq_len: int


def perplexity(model: nn.Module, tokens: Int[Tensor, "*shape"], window: int, batch_size: int) -> Perplexity:
    """Perplexity of a causal language model on `tokens`: a stream [tokens] that is cut into windows of `window`, or
    ready windows [window, seq], taken as they are.

    Losses are fp32 whatever the model's dtype is, summed in fp32 within a window and in fp64 over windows. The model is
    put into evaluation mode. ValueError: not one whole window of at least two tokens.
    """
    windows = tokens if tokens.ndim == 2 else cut_windows(tokens, window)
    num_windows, seq_len = windows.shape
    if num_windows == 0 or seq_len < 2:
        raise ValueError(f"{tokens.numel()} tokens do not fill one window of {window} (at least 2) tokens")
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    with torch.no_grad():
        for batch in windows.split(batch_size):
            ids = batch.to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            total += sum(float(negative_log_likelihood(*row).sum()) for row in zip(logits, ids, strict=True))
    num_tokens = num_windows * (seq_len - 1)
    return Perplexity(_exp(total / num_tokens), num_tokens, num_windows, seq_len)


def cut_windows(tokens: Int[Tensor, " tokens"], window: int) -> Int[Tensor, "window seq"]:
    """Consecutive windows without the last partial one."""
    whole = len(tokens) // window
    return tokens[: whole * window].view(whole, window)


def negative_log_likelihood(
    logits: Float[Tensor, "seq vocabulary"], ids: Int[Tensor, " seq"]
) -> Float[Tensor, " seq_minus_one"]:
    """-log p(token_i | the tokens before it) in nats for i = 2 .. seq, fp32. One sample at a time bounds the memory of
    the fp32 copy."""
    return cross_entropy(logits[:-1].float(), ids[1:], reduction="none")


def _exp(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf
