"""What calibration accumulates about the inputs of a linear, in fp32 whatever the weights are.

A sample is one calibration sequence; squared norms and Hessians are means over samples, as in the authors' codes of
Wanda (arXiv 2306.11695) and SparseGPT (arXiv 2301.00774), so that they do not depend on how samples are batched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.machine import distributed

AT_ONCE = 2**24  # numbers that are squared together


@runtime_checkable
class Statistic(Protocol):
    """Accumulates over batches of a linear's inputs; the samples that its means are of are known at the end."""

    def __init__(self, columns: int, device: torch.device) -> None: ...

    def add(self, inputs: Tensor) -> None: ...

    def sum_over_ranks(self, samples: int) -> None:
        """`samples`: of all ranks, those too of which no token reached an expert."""
        ...

    def is_finite(self) -> bool: ...


@runtime_checkable
class WithNorm(Statistic, Protocol):
    """A statistic that has the `squared_norm` of `InputNorm`."""

    @property
    def squared_norm(self) -> Float[Tensor, " in"]: ...


S = TypeVar("S", bound=Statistic)


def is_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN. Looks at the minimum and maximum only: 20 x faster on a CPU."""
    return bool(torch.stack(values.aminmax()).isfinite().all())


def sums_in_fp32(values: Tensor) -> bool:
    """Whether the device multiplies these 16-bit numbers in its tensor cores and sums the products, which fp32 holds
    exactly, in fp32: as precise as a product of fp32 copies, and some ten times as fast."""
    half = values.dtype in (torch.float16, torch.bfloat16)
    return half and values.device.type in ("cuda", "meta") and hasattr(torch.ops.aten.mm, "dtype")


def _in_fp32(inputs: Float[Tensor, "*token in"]) -> Iterator[Float[Tensor, "_token in"]]:
    """The tokens, few at a time: fp32 copies, squares and, as torch sums up fp32 numbers in fp64, copies in fp64 of all
    would be eight times a batch in 16 bits."""
    for part in inputs.flatten(0, -2).split(max(AT_ONCE // inputs.shape[-1], 1)):
        yield part.float()


class InputNorm:
    """Mean over samples of ||X_j||^2, the squared norm of input feature j over the tokens of a sample [in].

    Squares are fp32, their sums fp64: how samples are batched and dealt out to ranks does not show in fp32, where one
    unit in the last place can swap the ranks of two weights."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        self.samples = 0

    def add(self, inputs: Float[Tensor, "*token in"]) -> None:
        """Accumulate more tokens (some models flatten samples and tokens into one axis)."""
        for tokens in _in_fp32(inputs):
            self.total += tokens.square().sum(dim=0, dtype=torch.float64)

    @property
    def squared_norm(self) -> Float[Tensor, " in"]:
        """The statistic, called `scaler_row` in Wanda's code."""
        return (self.total / self.samples).float()

    def sum_over_ranks(self, samples: int) -> None:
        self.total, self.samples = distributed.all_sum(self.total), samples

    def is_finite(self) -> bool:
        return is_finite(self.total.float())


class InputMoments:
    """What DSnoT (arXiv 2310.08915) asks of each input feature: `squared_norm` as `InputNorm` has it, the mean over
    samples of its sum over a sample's tokens, and its variance over all tokens. Sums are fp64, as there."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self.sums = torch.zeros_like(self.squares)
        self.samples = self.tokens = 0

    def add(self, inputs: Float[Tensor, "*token in"]) -> None:
        for tokens in _in_fp32(inputs):
            self.squares += tokens.square().sum(dim=0, dtype=torch.float64)
            self.sums += tokens.sum(dim=0, dtype=torch.float64)
            self.tokens += len(tokens)

    @property
    def squared_norm(self) -> Float[Tensor, " in"]:
        """Mean over samples of ||X_j||^2."""
        return (self.squares / self.samples).float()

    @property
    def total(self) -> Float[Tensor, " in"]:
        """Mean over samples of the sum over a sample's tokens."""
        return (self.sums / self.samples).float()

    @property
    def variance(self) -> Float[Tensor, " in"]:
        """E[x^2] - E[x]^2 over all tokens."""
        mean = self.sums / self.tokens
        return (self.squares / self.tokens - mean.square()).clamp(min=0).float()

    def sum_over_ranks(self, samples: int) -> None:
        self.squares, self.sums = distributed.all_sum(self.squares), distributed.all_sum(self.sums)
        self.samples, self.tokens = samples, distributed.total(self.tokens)

    def is_finite(self) -> bool:
        return is_finite(self.squares.float())


class Hessian:
    """H = 2/n sum over samples of X^T X [in in], the Hessian of the layer-wise squared error (SparseGPT, Section 3)."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.upper = torch.zeros(columns, columns, dtype=torch.float32, device=device)  # right where above the diagonal
        self.samples = 0

    def add(self, inputs: Float[Tensor, "*token in"]) -> None:
        tokens = inputs.flatten(0, -2)
        as_they_are = sums_in_fp32(tokens)
        tokens = tokens if as_they_are else tokens.float()
        for panel in self.panels:
            part, left, right = self.upper[panel, panel.start :], tokens[:, panel].T, tokens[:, panel.start :]
            if as_they_are:
                part.add_(torch.mm(left, right, out_dtype=torch.float32))
            else:
                part.addmm_(left, right)

    @property
    def panels(self) -> list[slice]:
        """Rows that are summed from the diagonal to the right: H is symmetric, which spares 15/32 of the products."""
        columns = len(self.upper)
        width = max(columns // 16, 128)
        return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]

    @property
    def matrix(self) -> Float[Tensor, "in in"]:
        whole = self.upper * (2 / self.samples)
        for panel in self.panels:
            block = whole[panel, panel]
            block.copy_(block.triu() + block.triu(1).T)
            whole[panel.stop :, panel] = whole[panel, panel.stop :].T
        return whole

    @property
    def squared_norm(self) -> Float[Tensor, " in"]:
        """What `InputNorm` accumulates: half the diagonal."""
        return self.upper.diagonal() / self.samples

    def sum_over_ranks(self, samples: int) -> None:
        self.upper, self.samples = distributed.all_sum(self.upper), samples

    def is_finite(self) -> bool:
        return is_finite(self.upper)


def by_shared_input(statistics: Mapping[str, S]) -> Iterator[tuple[S, tuple[str, ...]]]:
    """Each distinct statistic once, with the linears that share it (q, k and v; gate and up)."""
    groups: dict[int, list[str]] = {}
    for name, statistic in statistics.items():
        groups.setdefault(id(statistic), []).append(name)
    for names in groups.values():
        yield statistics[names[0]], tuple(names)
