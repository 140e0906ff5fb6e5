"""Perplexity by the protocol of the BESA paper (arXiv 2402.16880, Section 4; the same as GPTQ's and SparseGPT's).

The tokens are cut into consecutive windows; the last, partial one is dropped. Each window is scored by itself, without
the tokens before it, and its first token is not predicted:

    perplexity = exp( mean over windows, mean over i = 2 .. seq_len, of -log p(token_i | token_1 .. token_{i-1}) )

Logits that are not finite are refused, by whatever they are scored: NaN and infinities have no ranking, though argmax
names one, the first choice, so that a broken model would have the accuracy of whoever always says A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from besa_exp.errors import Unavailable, as_unavailable
from besa_exp.evaluation.batches import BatchSize, halved_until_it_fits, rows_at_once, tokens_at_once
from besa_exp.machine import distributed

# Logits that are held in fp32 at a time. On a CPU they stay in its cache: with a vocabulary of 32,000
# they add 2 % to a forward pass, and 10 % with 2**24 (processor time, 1 thread). The number for a GPU is a guess.
LOGITS_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}
NOT_PREDICTED = -100  # the target that cross_entropy leaves out


@dataclass(frozen=True)
class Perplexity:
    """The value (infinite where the mean loss is beyond 709 nats), and what it was measured on: `num_tokens` predicted
    tokens, which is num_windows * (seq_len - 1), in batches of `batch_size` windows."""

    value: float
    num_tokens: int
    num_windows: int
    seq_len: int
    batch_size: int


OnCount = Callable[[int, int, str], None]  # how many are done, of how many, of what


def uncounted(done: int, total: int, of: str) -> None:
    """Nobody watches."""


def perplexity(
    model: nn.Module, tokens: Int[Tensor, "*shape"], window: int, batch_size: BatchSize, on_count: OnCount = uncounted
) -> Perplexity:
    """Perplexity of a causal language model on `tokens`: a stream [tokens] that is cut into windows of `window`, or
    ready windows [window, seq], taken as they are.

    Losses are fp32 whatever the model's dtype is, summed in fp64; of several ranks each scores its own windows. A batch
    that does not fit the device's memory is halved. The model is put into evaluation mode. ValueError: not one whole
    window of at least two tokens; Unavailable: a single window does not fit, or the logits are not finite.
    """
    windows = tokens if tokens.ndim == 2 else cut_windows(tokens, window)
    num_windows, seq_len = windows.shape
    if num_windows == 0 or seq_len < 2:
        raise ValueError(f"{tokens.numel()} tokens do not fill one window of {window} (at least 2) tokens")
    model.eval()
    own = distributed.own_samples(windows)
    total, size = distributed.agreed(lambda: _sum_and_batch(model, own, batch_size, on_count))
    return perplexity_of(float(distributed.all_sum(total)), windows, size)


@torch.no_grad()
def _sum_and_batch(
    model: nn.Module, windows: Int[Tensor, "window seq"], batch_size: BatchSize, on_count: OnCount
) -> tuple[Float[Tensor, ""], int]:
    """The sum of the losses of all windows, and the size of the batches in the end."""
    num_windows, seq_len = windows.shape
    device = next(model.parameters()).device
    size = rows_at_once(tokens_at_once(model), seq_len) if batch_size == "auto" else batch_size
    size, done = min(size, num_windows), 0
    total = torch.zeros((), dtype=torch.float64, device=device)

    def loss_of_next(size: int) -> Float[Tensor, ""]:
        ids = windows[done : done + size].to(device)
        return sum_of_losses(model(input_ids=ids, use_cache=False).logits, ids)

    with as_unavailable():
        while done < num_windows:
            loss, size = halved_until_it_fits(loss_of_next, size, f"window of {seq_len} tokens")
            total += loss
            done += size
            on_count(min(done, num_windows), num_windows, "windows")
    return total, size


def perplexity_of(total: float, windows: Int[Tensor, "window seq"], batch_size: int) -> Perplexity:
    """From the sum of the losses of all `windows`."""
    num_windows, seq_len = windows.shape
    num_tokens = num_windows * (seq_len - 1)
    return Perplexity(_exp(total / num_tokens), num_tokens, num_windows, seq_len, batch_size)


def cut_windows(tokens: Int[Tensor, " tokens"], window: int) -> Int[Tensor, "window seq"]:
    """Consecutive windows without the last partial one."""
    whole = len(tokens) // window
    return tokens[: whole * window].view(whole, window)


def sum_of_losses(logits: Float[Tensor, "window seq vocabulary"], ids: Int[Tensor, "window seq"]) -> Float[Tensor, ""]:
    """The sum over windows and i = 2 .. seq of -log p(token_i | the tokens before it) in nats; fp64. Unavailable: the
    logits are not finite.

    Logits become fp32 a few rows at a time: an fp32 copy of them all would be the largest tensor of an evaluation."""
    check_finite(logits)
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], NOT_PREDICTED)], dim=1)
    rows = max(1, LOGITS_AT_ONCE[logits.device.type] // logits.shape[-1])
    parts = zip(logits.flatten(0, 1).split(rows), following.flatten().split(rows), strict=True)
    losses = [cross_entropy(part.float(), targets, reduction="none").double().sum() for part, targets in parts]
    return torch.stack(losses).sum()


def _exp(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


def check_finite(logits: Tensor) -> None:
    """Unavailable: a logit is NaN or infinite. One pass over them, without a copy."""
    if logits.numel() == 0:
        return
    lowest, highest = (float(value) for value in torch.aminmax(logits.detach()))
    if not (-math.inf < lowest <= highest < math.inf):
        raise Unavailable(
            f"the model's logits are not finite (from {lowest} to {highest}), so nothing of it can be scored: its "
            "weights or its states are broken; where the weights are float16, model.dtype=float32 may help"
        )


@contextmanager
def finite_logits(model: nn.Module) -> Iterator[None]:
    """Checks the logits of each of the model's forward passes, whoever calls it, as long as this lasts."""

    def check(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        masked = options.get("attention_mask") is not None  # generating: others than the last may be padding
        check_finite(output.logits[:, -1] if masked else output.logits)

    with model.register_forward_hook(check, with_kwargs=True):
        yield
