"""How many windows or questions pass through a model together.

More than some thousand tokens at once make no forward pass faster, and the logits [batch, seq, vocabulary] are the
largest thing an evaluation holds: so a batch is measured in tokens. Where a batch does not fit all the same, it is
halved; scores do not depend on batches beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch

from besa_exp.errors import Unavailable

BatchSize = int | Literal["auto"]
T = TypeVar("T")

# Best on a core (experiments/benchmarks/evaluation.py): smaller batches pay for calls, larger ones for fresh memory.
TOKENS_ON_CPU = 2048
BYTES_ON_CPU = 2**30
TOKENS_ON_CUDA = 2**15
SHARE_OF_FREE_MEMORY = 0.6  # the rest is for what the estimate does not know


def tokens_at_once(model: Any) -> int:
    """Tokens of an automatic batch on the model's device."""
    device, needed = next(model.parameters()).device, bytes_per_token(model)
    if device.type != "cuda":
        return min(TOKENS_ON_CPU, BYTES_ON_CPU // needed)
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(TOKENS_ON_CUDA, int(free * SHARE_OF_FREE_MEMORY) // needed)


def rows_at_once(tokens: int, length: int) -> int:
    """Rows of `length` tokens in a batch of about `tokens`: one at least."""
    return max(1, tokens // length)


def halved_until_it_fits(attempt: Callable[[int], T], size: int, what: str) -> tuple[T, int]:
    """`attempt(size)`, the size halved as long as the device's memory does not hold it, and the size that did.

    Raises Unavailable where a single one does not fit; `what` names it."""
    while True:
        try:
            return attempt(size), size
        except torch.OutOfMemoryError:
            if size <= 1:  # 0 tokens, where less than one has room
                raise Unavailable(f"a single {what} does not fit into the device's memory") from None
        size //= 2
        torch.cuda.empty_cache()  # does nothing where CUDA was not used; here the failed attempt's tensors are gone


def bytes_per_token(model: Any) -> int:
    """What a token of a batch takes: its logits twice (the matrix product and what is made of it), a block's states."""
    config = model.config.get_text_config()
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, list | tuple) else inner  # one a layer, as Gemma 3n has them
    values = 2 * model.get_input_embeddings().num_embeddings + 16 * hidden + 4 * inner
    return values * next(model.parameters()).element_size()
