"""Adam as the searches here take it: fp32 tensors, each with its first step size, which falls along half a cosine; and
back to the best state that was seen, to go on from there with smaller steps, where the probe finds no gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

SHRINK = 0.4  # of the step size, where the steps that were taken with it did not help
Optimizers = Sequence[torch.optim.Adam]


def falling(step: int, num_steps: int) -> float:
    """(1 + cos(pi step / num_steps)) / 2, from 1 to 0."""
    return (1 + math.cos(math.pi * step / num_steps)) / 2


def kept_size(weight: Float[Tensor, "out in"], kept: Int[Tensor, ""]) -> float:
    """The root mean square of a linear's `kept` weights; the others are 0."""
    return float(weight.norm() / kept.clamp(min=1).sqrt())


def adam_on_weights(
    weights: Mapping[str, Float[Tensor, "*_shape"]], first: Mapping[str, float], more: Iterable[dict[str, Any]] = ()
) -> torch.optim.Adam:
    """On each linear's weights with its first step size, and on `more`."""
    groups = [{"params": [weight], "first_lr": first[name]} for name, weight in weights.items()]
    on_gpu = next(iter(weights.values())).is_cuda
    return torch.optim.Adam([*groups, *more], betas=(0.9, 0.99), eps=1e-16, fused=on_gpu)


def begin_adam(optimizer: torch.optim.Adam, value: Tensor, moment: Tensor, square: Tensor) -> None:
    """Let the moments of `value` lie in these rooms."""
    step = torch.zeros((), device=value.device)
    optimizer.state[value] = {"step": step, "exp_avg": moment.zero_(), "exp_avg_sq": square.zero_()}


def take_step(optimizer: torch.optim.Adam, scale: float) -> None:
    """A step of `scale` times the first size; the gradients, which may be as large as the weights, go."""
    for group in optimizer.param_groups:
        group["lr"] = group["first_lr"] * scale
    optimizer.step()
    optimizer.zero_grad()


class Best:
    """The best state that the probe saw of what the optimizers change, and its loss there. `room`: for copies of all
    of it, in order."""

    def __init__(self, optimizers: Optimizers, loss: float, room: Sequence[Tensor] | None = None) -> None:
        self._held = [(own, value) for own in optimizers for group in own.param_groups for value in group["params"]]
        self._copies = [torch.empty_like(value) for _, value in self._held] if room is None else room
        self.now(loss)

    def judged(self, loss: float) -> float:
        """What the step size is to be multiplied by: 1 where the probe's `loss` is a new best, else SHRINK;
        then all is back at the best and stands still."""
        if loss < self.loss:
            self.now(loss)
            return 1.0
        with torch.no_grad():
            for (optimizer, value), good in zip(self._held, self._copies, strict=True):
                value.copy_(good)
                optimizer.state[value]["exp_avg"].zero_()
        return SHRINK

    @torch.no_grad()
    def now(self, loss: float) -> None:
        """This state is the best, whatever was before."""
        for (_, value), copy in zip(self._held, self._copies, strict=True):
            copy.copy_(value)
        self.loss = loss


def descend(
    parameters: Sequence[tuple[Tensor, float]],
    batches: Iterable[Tensor],
    num_steps: int,
    checks: int,
    gradient: Callable[[Tensor, int, float], Sequence[Tensor]],
    project: Callable[[], None],
    judge: Callable[[], float],
) -> float:
    """Adam on `parameters`, each with its first step size. Returns the judge's loss where they began; they end at the
    best that it saw.

    A step on the samples of a batch takes `gradient(samples, step, best loss)` and then calls `project`. `checks` times
    on the way `judge` looks: parameters that do not lower its loss go back to the best, stand still and go on with
    smaller steps."""
    groups = [{"params": [tensor], "first_lr": size} for tensor, size in parameters]
    optimizer = torch.optim.Adam(groups, betas=(0.8, 0.99), eps=1e-30, fused=parameters[0][0].is_cuda)
    every, started = math.ceil(num_steps / checks), judge()
    best = Best([optimizer], started)
    for step, samples in zip(range(num_steps), batches, strict=False):
        for (tensor, _), found in zip(parameters, gradient(samples, step, best.loss), strict=True):
            tensor.grad = found
        take_step(optimizer, falling(step, num_steps))
        project()
        if (step + 1) % every and step + 1 < num_steps:
            continue
        shrunk = best.judged(judge())
        for group in optimizer.param_groups:
            group["first_lr"] *= shrunk
    return started
