"""Whether a model's logits can be scored at all: NaN and infinities have no ranking, though argmax names one.

`argmax` of NaN is the first choice, so that a broken model would have the accuracy of whoever always says A.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from besa_exp.errors import Unavailable


def check_finite(logits: Tensor) -> None:
    """Unavailable: a logit is NaN or infinite. One pass over them, without a copy."""
    if logits.numel() == 0:
        return
    lowest, highest = (float(value) for value in torch.aminmax(logits.detach()))
    if not (-float("inf") < lowest <= highest < float("inf")):
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

    handle = model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
