"""Importance: a score for every weight of a linear [out in]; the lowest are pruned first. All in fp32.

The functions are the formulas. An `Importance` is such a formula together with what it needs to know: the statistic of
the linear's inputs, and whether the gradient to its weights. `importance_of` finds one by the name that
`pruner.importance=` and `budget.importance=` take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.rules import NotNegative, Positive, check_fields
from besa_exp.tensors.statistics import InputNorm, Statistic, WithNorm


@runtime_checkable
class Importance(Protocol):
    """A formula and what it needs. To add one: a frozen dataclass with these members, named by `_target_` in YAML."""

    @property
    def statistic(self) -> type[Statistic] | None:
        """What to observe about a linear's inputs; None: nothing."""
        ...

    @property
    def gradients(self) -> bool:
        """Whether the gradient to the weights must be observed."""
        ...

    def __call__(
        self, weight: Float[Tensor, "out in"], statistic: Any, squared_gradient: Float[Tensor, "out in"] | None
    ) -> Float[Tensor, "out in"]:
        """The scores in fp32. `squared_gradient`: its mean over samples; None: not observed."""
        ...


def magnitude_importance(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """|W|."""
    return weight.float().abs()


def wanda_importance(weight: Float[Tensor, "out in"], squared_norm: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """|W_ij| ||X_j||_2 (Wanda, arXiv 2306.11695, Eq. 1)."""
    return weight.float().abs() * squared_norm.sqrt()


def rounded_importance(
    weight: Float[Tensor, "out in"], rounded: Float[Tensor, "out in"], squared_norm: Float[Tensor, " in"]
) -> Float[Tensor, "out in"]:
    """(W_ij^2 - (W_ij - Q_ij)^2) ||X_j||^2: how much smaller the squared error is if the rounded weight is kept and not
    pruned. Without rounding that is Wanda's importance squared; for a weight that rounds to zero it is 0."""
    weight, rounded = weight.float(), rounded.float()
    return rounded * (2 * weight - rounded) * squared_norm


def ria_importance(
    weight: Float[Tensor, "out in"], squared_norm: Float[Tensor, " in"], power: float = 0.5
) -> Float[Tensor, "out in"]:
    """(|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) ||X_j||^power (RIA, Zhang et al., ICLR 2024); rows and columns of
    zeros count 0."""
    size = weight.float().abs()
    smallest = torch.finfo(size.dtype).tiny
    of_row, of_column = (size / size.sum(dim=axis, keepdim=True).clamp(min=smallest) for axis in (1, 0))
    return (of_row + of_column) * squared_norm.pow(power / 2)


def obs_importance(
    weight: Float[Tensor, "out in"], factor: Float[Tensor, "in in"], squared: bool = True
) -> Float[Tensor, "out in"]:
    """W_ij^2 / U_jj^2, the rise of the squared error when weight ij goes (SparseGPT, arXiv 2301.00774, Algorithm 1).
    BESA's authors divide by U_jj instead (`squared=False`). `factor` is R of `upper_factor`: 1 / U_jj = R_jj."""
    diagonal = factor.diagonal()
    return weight.float().square() * (diagonal.square() if squared else diagonal)


def wanda_plus_importance(
    weight: Float[Tensor, "out in"],
    squared_norm: Float[Tensor, " in"],
    squared_gradient: Float[Tensor, "out in"],
    scale: float = 100.0,
) -> Float[Tensor, "out in"]:
    """(scale G_ij + ||X_j||) |W_ij| (Wanda++, arXiv 2503.04992): G is the root mean square over samples of the gradient
    of the block's output norm ||f(X)||_2. ||X_j|| is a root mean square over samples too, as in Wanda's code: summed
    over n samples, as Wanda's paper writes it, it would be sqrt(n) times as large beside G."""
    return weight.float().abs() * (scale * squared_gradient.sqrt() + squared_norm.sqrt())


@dataclass(frozen=True)
class Magnitude:
    """`magnitude_importance`: no data."""

    statistic = None
    gradients = False

    def __call__(self, weight: Tensor, statistic: None, squared_gradient: Tensor | None) -> Tensor:
        return magnitude_importance(weight)


@dataclass(frozen=True)
class Wanda:
    """`wanda_importance`."""

    statistic = InputNorm
    gradients = False

    def __call__(self, weight: Tensor, statistic: WithNorm, squared_gradient: Tensor | None) -> Tensor:
        return wanda_importance(weight, statistic.squared_norm)


@dataclass(frozen=True)
class Ria:
    """`ria_importance`; `power` is the paper's a."""

    power: NotNegative = 0.5

    statistic = InputNorm
    gradients = False

    def __post_init__(self) -> None:
        check_fields(self, "pruner.importance")

    def __call__(self, weight: Tensor, statistic: WithNorm, squared_gradient: Tensor | None) -> Tensor:
        return ria_importance(weight, statistic.squared_norm, self.power)


@dataclass(frozen=True)
class WandaPlus:
    """`wanda_plus_importance`; `scale` is the paper's alpha."""

    scale: Positive = 100.0

    statistic = InputNorm
    gradients = True

    def __post_init__(self) -> None:
        check_fields(self, "pruner.importance")

    def __call__(self, weight: Tensor, statistic: WithNorm, squared_gradient: Tensor | None) -> Tensor:
        assert squared_gradient is not None, "the gradient to the weights was not observed"
        return wanda_plus_importance(weight, statistic.squared_norm, squared_gradient, self.scale)


ImportanceName = Literal["magnitude", "wanda", "ria", "wanda_plus"]
IMPORTANCES: dict[ImportanceName, Importance] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "ria": Ria(),
    "wanda_plus": WandaPlus(),
}


def importance_of(named: Importance | ImportanceName) -> Importance:
    """The importance itself, or the one of this name. ValueError: there is none."""
    if not isinstance(named, str):
        return named
    if named not in IMPORTANCES:
        raise ValueError(f"importance={named}: must be one of {', '.join(IMPORTANCES)}")
    return IMPORTANCES[named]


def importance_name(named: Importance | ImportanceName) -> str:
    """As a message calls it."""
    return named if isinstance(named, str) else type(named).__name__.lower()
