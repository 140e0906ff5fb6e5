"""A model's gradients one tensor at a time: each is taken as soon as it is whole, and dropped.

A gradient is as large as the weight; kept for all tensors until the step they would take as much memory as the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

Take = Callable[[str, Tensor], object]
"""What is done with the gradient of the parameter of this name; it is dropped afterwards."""


@contextmanager
def taking_gradients(parameters: Mapping[str, nn.Parameter], take: Take) -> Iterator[None]:
    """Backward passes inside give the gradient of each of `parameters` to `take`; no other is computed."""
    hooks = [
        parameter.requires_grad_().register_post_accumulate_grad_hook(partial(_take, take, name))
        for name, parameter in parameters.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


@torch.no_grad()
def _take(take: Take, name: str, parameter: Tensor) -> None:
    assert parameter.grad is not None
    take(name, parameter.grad)
    parameter.grad = None
