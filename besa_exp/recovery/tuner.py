"""What a recovery method is to the tuning loop.

A method is a frozen dataclass of its settings; `begin` makes a tuner of it, which holds what is trained. Between steps
the model holds the tuned weights as they would be saved, in its own dtype and with exact zeros: it is scored, saved and
compared as it stands, so that what is merged is what was trained, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from besa_exp.tensors.keep_bits import KeepBits

Windows = Int[Tensor, "sample *options seq"]
"""Of text, or examples of a task with their options (`texts.tasks.Options`)."""
Logits = Float[Tensor, "sequence _seq vocabulary"]


@dataclass(frozen=True)
class Taken:
    """What one step saw: the loss of its windows before it, and the norm of the gradient, where there is one."""

    loss: float
    gradient_norm: float | None = None


@runtime_checkable
class Objective(Protocol):
    """The loss that is minimised."""

    def differentiate(self, windows: Windows) -> tuple[float, float]:
        """The loss of the windows of all ranks and a multiple of its gradient, handed to the model's parameters by
        backward passes over the own windows; then what it is a multiple of: gradients are to be divided by it."""
        ...

    def of_logits(self, logits: Logits, windows: Windows) -> Float[Tensor, ""]:
        """The sum over windows of the loss of each, in fp32; `differentiate` gives their mean over a batch."""
        ...


@runtime_checkable
class Tuner(Protocol):
    """What is trained, and how. `parameters`: those of the model that it changes, by name. `keep`: what is kept now,
    which is what it was begun with but for methods that exchange zeros."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]: ...

    @property
    def keep(self) -> Mapping[str, KeepBits]: ...

    def step(self, objective: Objective, windows: Windows, number: int, scale: float) -> Taken:
        """Step `number` on the windows, with `scale` times the full step size. Nothing is changed where the loss or the
        gradient is not finite."""
        ...

    def ready(self) -> AbstractContextManager[None]:
        """With it the model can be called as a whole, with the tuned weights: it is there where blocks lie in files."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on; tensors are not copied."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave, with a model that holds the pruned weights: it then holds the tuned ones."""
        ...


@runtime_checkable
class Method(Protocol):
    """The settings of a method."""

    def begin(self, model: nn.Module, keep: Mapping[str, KeepBits], seed: int) -> Tuner:
        """A tuner of the model, whose zeros `keep` names."""
        ...
