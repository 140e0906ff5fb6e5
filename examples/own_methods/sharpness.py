"""A recovery method: norms and biases by SAM, sharpness-aware minimisation (Foret et al., arXiv 2010.01412).

    W <- AdamW(W, dL/dW at W + rho g / ||g||),    g = dL/dW at W.

The gradient is taken where a step of the length rho uphill ends: minima that are flat are preferred to sharp ones. Each
step takes two passes forward and back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from besa_exp.recovery.descent import Adam, Descent
from besa_exp.recovery.full import norms_and_biases
from besa_exp.recovery.tuner import Objective, Windows
from besa_exp.rules import Positive, check_fields
from besa_exp.tensors.keep_bits import KeepBits


class Sharpness(Descent):
    """`Descent` with the gradient of another place; its steps, states and zeros are as ever."""

    rho = 0.0

    def differentiate(self, objective: Objective, windows: Windows) -> tuple[float, float]:
        """The loss and the gradient's norm at the weights, the gradient that is left at W + rho g / ||g||."""
        loss, norm = super().differentiate(objective, windows)
        if not (math.isfinite(loss) and math.isfinite(norm) and norm > 0):
            return loss, norm
        length = norm if self.adam.clip is None else min(norm, self.adam.clip)  # of what is left in the leaves
        with torch.no_grad():
            before = [leaf.detach().clone() for leaf in self.leaves.values()]
            for leaf in self.leaves.values():
                assert leaf.grad is not None
                leaf.add_(leaf.grad, alpha=self.rho / length)
        self.optimizer.zero_grad()
        self.write()
        super().differentiate(objective, windows)
        with torch.no_grad():
            for leaf, value in zip(self.leaves.values(), before, strict=True):
                leaf.copy_(value)
        self.write()
        return loss, norm


@dataclass(frozen=True)
class Sam:
    """`rho`: how far uphill."""

    rho: Positive = 0.05
    adam: Adam = field(default_factory=lambda: Adam(lr=1e-2))

    def __post_init__(self) -> None:
        check_fields(self, "recovery.method")

    def begin(self, model: nn.Module, keep: Mapping[str, KeepBits], seed: int) -> Sharpness:
        """All parameters of one axis, which hold no zeros to keep."""
        tuner = Sharpness(model, norms_and_biases(model), self.adam, keep)
        tuner.rho = self.rho
        return tuner
