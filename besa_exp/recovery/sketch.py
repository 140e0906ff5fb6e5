"""Sketches: the rows of a linear are look-up tables, and the tables are tuned.

    W[i, j] = table[i, code[i, j]];   dL/dtable[i, c] = sum of dL/dW[i, j] over the places with code c

SpaLLM, later SketchTune (Zhang et al., arXiv 2410.06364). A row's table of 2^b values is a weighted k-means of its kept
weights, the weight of input j the power -4 of U_jj, the diagonal of the upper Cholesky factor of the inverse Hessian
(LeanQuant, arXiv 2407.10032). Codes are chosen column by column: the nearest entry, whose error is made up for in later
columns as in SparseGPT. Then codes stand still, and the tables are trained in fp32.

On a pruned linear entry 0 is 0 and is not trained, and it is the code of each pruned weight and of no other: a joint
sparse and quantised tuning. What is saved are plain weights, of at most 2^b values a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from besa_exp.recovery.descent import Adam, Descent, Form
from besa_exp.recovery.keep_bits import KeepBits, parameters_of_linears, without_negative_zeros
from besa_exp.recovery.norms import norms_and_biases

BITS = range(2, 5)
EXPONENT = 4  # of 1 / U_jj (LeanQuant)
ITERATIONS = 100
Table = Float[Tensor, "out entry"]
Codes = UInt8[Tensor, "out in"]


@dataclass(frozen=True)
class Looked:
    """A tensor by its tables. `frozen`: entry 0 is 0 and stays so."""

    table: Table
    codes: Codes
    frozen: bool

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """The tables."""
        return {"table": self.table}

    def write(self, parameter: Tensor) -> None:
        """Gather, rounded once."""
        weight = self.table.gather(1, self.codes.long())
        parameter.copy_(without_negative_zeros(weight.to(parameter.dtype)).view(parameter.shape))

    def gradients(self, gradient: Tensor) -> Mapping[str, Tensor]:
        """Sums over the places of each entry."""
        flat = gradient.reshape(self.codes.shape).to(self.table.dtype)
        found = torch.zeros_like(self.table).scatter_add_(1, self.codes.long(), flat)
        if self.frozen:
            found[:, 0] = 0
        return {"table": found}


@dataclass(frozen=True)
class Sketch:
    """`bits` b. Without Hessians all inputs weigh alike and codes are the nearest entries. `norms`: norms and biases
    are trained beside the tables."""

    adam: Adam = field(default_factory=lambda: Adam(lr=1e-4))
    bits: int = 4
    norms: bool = True
    factors: Mapping[str, Float[Tensor, "_in _in"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"recovery.bits={self.bits}: must be from {BITS.start} to {BITS.stop - 1}")

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Any model."""
        return []

    def begin(self, model: nn.Module, keep: Mapping[str, KeepBits], seed: int) -> Descent:
        """Tables for each linear of the blocks; the model holds the sketched weights from now on."""
        forms: dict[str, Form] = {}
        for name, parameter in parameters_of_linears(model).items():
            weight = parameter.detach().reshape(-1, parameter.shape[-1]).float()
            mask = keep[name].mask().view(weight.shape) if name in keep else None
            factor = self.factors.get(name)
            table = tables(weight, mask, self.bits, None if factor is None else factor.diagonal().pow(-EXPONENT))
            form = Looked(table, sketch_codes(weight, table, mask, factor), frozen=mask is not None)
            forms[name] = form
            form.write(parameter.detach())
        return Descent(model, forms | (norms_and_biases(model) if self.norms else {}), self.adam, keep)


def tables(
    weight: Float[Tensor, "out in"],
    keep_mask: Bool[Tensor, "out in"] | None,
    bits: int,
    importances: Float[Tensor, " in"] | None = None,
) -> Table:
    """2^b values of each row by weighted k-means (Lloyd), rising. With a mask entry 0 is 0 and the others are of the
    kept weights alone.

    minimises sum_j importance_j (w_j - nearest value)^2 of each row."""
    shares = torch.ones_like(weight) if importances is None else importances.to(weight.dtype).expand_as(weight).clone()
    count = 1 << bits
    if keep_mask is None:
        return _clustered(weight, shares, count)
    values = _clustered(weight, shares.masked_fill_(~keep_mask, 0), count - 1)
    return torch.cat([torch.zeros_like(values[:, :1]), values], dim=1)


def sketch_codes(
    weight: Float[Tensor, "out in"],
    table: Table,
    keep_mask: Bool[Tensor, "out in"] | None,
    factor: Float[Tensor, "in in"] | None = None,
) -> Codes:
    """The nearest entry of each weight, ties to the first; with `factor` U, column by column, the error (w - q) / U_jj
    made up for in later columns. Pruned weights have code 0, others another."""
    left = weight.clone()
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    first = 0 if keep_mask is None else 1
    for column in range(weight.shape[1]):
        distances = (table[:, first:] - left[:, column, None]).abs()
        nearest = (distances.argmin(dim=1) + first).to(torch.uint8)
        if keep_mask is not None:
            nearest = nearest * keep_mask[:, column]
        codes[:, column] = nearest
        if factor is not None:
            chosen = table.gather(1, nearest.long()[:, None])[:, 0]
            error = (left[:, column] - chosen) / factor[column, column]
            left[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    return codes


def _clustered(values: Float[Tensor, "out in"], shares: Float[Tensor, "out in"], count: int) -> Table:
    """Of each row the best of three: begun evenly as LeanQuant does, by density, and at the values that are worst
    served so far. The first alone ends in a poor place where importances are far apart."""
    begun = (begin(values, shares, count) for begin in (_evenly, _by_density, _at_the_worst_served))
    found = torch.stack([_lloyd(values, shares, centres) for centres in begun])
    best = torch.stack([_error(values, shares, centres) for centres in found]).argmin(dim=0)
    return found[best, torch.arange(len(values), device=values.device)]


def _evenly(values: Float[Tensor, "out in"], shares: Float[Tensor, "out in"], count: int) -> Table:
    """From the least to the greatest value that has a share; 0 in a row without one."""
    low = values.masked_fill(shares == 0, torch.inf).amin(dim=1, keepdim=True)
    high = values.masked_fill(shares == 0, -torch.inf).amax(dim=1, keepdim=True)
    low, high = (torch.where(low <= high, edge, 0) for edge in (low, high))
    return low + (high - low) * torch.linspace(0, 1, count, device=values.device, dtype=values.dtype)


def _by_density(values: Float[Tensor, "out in"], shares: Float[Tensor, "out in"], count: int) -> Table:
    """Quantiles by the density of values that is best for many of them, (density of the numbers * share)^(1/3) (Panter
    and Dite, 1951): of a number that is share^(1/3) spacing^(2/3)."""
    rising, order = values.sort(dim=1)
    gaps = nn.functional.pad(rising.diff(dim=1), (1, 1))
    spacing = (gaps[:, 1:] + gaps[:, :-1]) / 2
    density = shares.gather(1, order).pow(1 / 3) * spacing.pow(2 / 3)
    places = density.cumsum(dim=1) / density.sum(dim=1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    quantiles = (torch.arange(count, device=values.device, dtype=values.dtype) + 0.5) / count
    found = torch.searchsorted(places, quantiles.expand(len(values), -1).contiguous())
    return rising.gather(1, found.clamp(max=values.shape[1] - 1))


def _at_the_worst_served(values: Float[Tensor, "out in"], shares: Float[Tensor, "out in"], count: int) -> Table:
    """One after the other, where share times squared distance to the nearest is greatest; of equals the first."""
    mean = (values * shares).sum(dim=1) / shares.sum(dim=1).clamp(min=torch.finfo(values.dtype).tiny)
    nearest = (values - mean[:, None]).square()
    centres = []
    for _ in range(count):
        centres.append(values.gather(1, (nearest * shares).argmax(dim=1, keepdim=True)))
        nearest = torch.minimum(nearest, (values - centres[-1]).square())
    return torch.cat(centres, dim=1).sort(dim=1).values


def _error(values: Float[Tensor, "out in"], shares: Float[Tensor, "out in"], centres: Table) -> Float[Tensor, " out"]:
    return (shares * (values - centres.gather(1, _nearest(values, centres))).square()).sum(dim=1)


def _nearest(values: Float[Tensor, "out in"], centres: Table) -> Int[Tensor, "out in"]:
    """Centres rise, so that the nearest is the one between whose edges a value lies."""
    edges = (centres[:, 1:] + centres[:, :-1]) / 2
    return torch.searchsorted(edges.contiguous(), values)


def _lloyd(values: Float[Tensor, "out in"], shares: Float[Tensor, "out in"], centres: Table) -> Table:
    """Where an entry has no share it stays where it is."""
    for _ in range(ITERATIONS):
        place = _nearest(values, centres)
        total = torch.zeros_like(centres).scatter_add_(1, place, shares)
        summed = torch.zeros_like(centres).scatter_add_(1, place, shares * values)
        moved = torch.where(total > 0, summed / total.clamp(min=torch.finfo(total.dtype).tiny), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
