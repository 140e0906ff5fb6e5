"""Sketches: the rows of a linear are look-up tables, and the tables are tuned.

    W[i, j] = table[i, code[i, j]];   dL/dtable[i, c] = sum of dL/dW[i, j] over the places with code c

SpaLLM, later SketchTune (Zhang et al., arXiv 2410.06364). A row's table of 2^b values is a weighted k-means of its kept
weights; here all inputs weigh alike, where LeanQuant (arXiv 2407.10032), by which the authors sketch, takes them by
their Hessian. It is one table a row, the authors' GPR 1; they also cut rows into 2, 4 or 8 groups with a table each.
A code is that of the nearest entry; LeanQuant goes column by column and spreads what rounding costs over the later
ones, as GPTQ. Then codes stand still, and the tables are trained, in fp32 where the authors have bf16.

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
from besa_exp.recovery.full import norms_and_biases
from besa_exp.recovery.keep_bits import parameters_of_linears
from besa_exp.rules import check_fields
from besa_exp.settings import TableBits
from besa_exp.tensors.keep_bits import KeepBits, put_kept

ITERATIONS = 1000
ROWS = 256  # that are clustered together
SMALLEST = torch.finfo(torch.float64).tiny
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
        return {"table": self.table}

    def write(self, parameter: Tensor) -> None:
        """Gather, rounded once."""
        put_kept(self.table.gather(1, self.codes.long()), parameter, None)

    def gradients(self, gradient: Tensor) -> Mapping[str, Tensor]:
        """Sums over the places of each entry."""
        flat = gradient.reshape(self.codes.shape).to(self.table.dtype)
        found = torch.zeros_like(self.table).scatter_add_(1, self.codes.long(), flat)
        if self.frozen:
            found[:, 0] = 0
        return {"table": found}


@dataclass(frozen=True)
class Sketch:
    """`bits` b. `norms`: norms and biases are trained beside the tables."""

    adam: Adam = field(default_factory=lambda: Adam(lr=1e-3))
    bits: TableBits = 4
    norms: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "recovery")

    def begin(self, model: nn.Module, keep: Mapping[str, KeepBits], seed: int) -> Descent:
        """Tables for each linear of the blocks; the model holds the sketched weights from now on."""
        forms: dict[str, Form] = {}
        for name, parameter in parameters_of_linears(model).items():
            weight = parameter.detach().reshape(-1, parameter.shape[-1]).float()
            mask = keep[name].mask().view(weight.shape) if name in keep else None
            table = tables(weight, mask, self.bits)
            form = Looked(table, sketch_codes(weight, table, mask), frozen=mask is not None)
            forms[name] = form
            form.write(parameter.detach())
        return Descent(model, forms | (norms_and_biases(model) if self.norms else {}), self.adam, keep)


def tables(weight: Float[Tensor, "out in"], keep_mask: Bool[Tensor, "out in"] | None, bits: int) -> Table:
    """2^b values of each row by k-means, rising. With a mask entry 0 is 0 and the others are of the kept weights
    alone."""
    if keep_mask is None:
        return clustered(weight, torch.ones_like(weight), 1 << bits)
    values = clustered(weight, keep_mask.to(weight.dtype), (1 << bits) - 1)
    return torch.cat([torch.zeros_like(values[:, :1]), values], dim=1)


def sketch_codes(weight: Float[Tensor, "out in"], table: Table, keep_mask: Bool[Tensor, "out in"] | None) -> Codes:
    """The nearest entry of each weight, ties to the first. Pruned weights have code 0, others another."""
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    first = 0 if keep_mask is None else 1
    for column in range(weight.shape[1]):  # all at once would take 2^b times the weight's memory
        codes[:, column] = (table[:, first:] - weight[:, column, None]).abs().argmin(dim=1) + first
    return codes if keep_mask is None else codes * keep_mask


def clustered(values: Float[Tensor, "out in"], shares: Float[Tensor, "out in"], count: int) -> Table:
    """`count` values of each row that make sum share (value - nearest)^2 small, rising.

    Begun by density, each edge goes to the best place between its neighbours, which Lloyd's steps need not find. Where
    none moves any more the two clusters that cost least to join make room for the split that gains most, while that
    lowers the error."""
    rows = zip(values.double().split(ROWS), shares.double().split(ROWS), strict=True)
    return torch.cat([_Rows.of(*part).clustered(count) for part in rows]).to(values.dtype)


@dataclass(frozen=True)
class _Rows:
    """Values in rising order, and the sums of share, share x and share x^2 over the first of them: what a cluster of
    neighbours costs is a difference of sums. `edges` of clusters are numbers of values, from 0 to all."""

    rising: Float[Tensor, "out in"]
    sums: Float[Tensor, "3 out _edge"]

    @staticmethod
    def of(values: Float[Tensor, "out in"], shares: Float[Tensor, "out in"]) -> _Rows:
        rising, order = values.sort(dim=1)
        mass = shares.gather(1, order)
        sums = torch.stack([mass, mass * rising, mass * rising.square()]).cumsum(dim=2)
        return _Rows(rising, nn.functional.pad(sums, (1, 0)))

    def clustered(self, count: int) -> Float[Tensor, "out _entry"]:
        """The clusters' means, rising; of one without a share the value where it ends."""
        edges = self._by_density(count)
        for _ in range(ITERATIONS):
            moved = self._settled(self._settled(edges, 1), 2)
            if torch.equal(moved, edges):
                moved = self._exchanged(edges)
                if torch.equal(moved, edges):
                    break
            edges = moved
        mass, mean, _ = self._between(edges[:, :-1], edges[:, 1:])
        there = self.rising.gather(1, edges[:, 1:].clamp(max=self.rising.shape[1] - 1))
        return torch.where(mass > 0, mean / mass.clamp(min=SMALLEST), there).cummax(dim=1).values

    def _by_density(self, count: int) -> Int[Tensor, "out _edge"]:
        """Quantiles by the density of values that is best for many of them, (density of the numbers * share)^(1/3)
        (Panter and Dite, 1951): of a number that is share^(1/3) spacing^(2/3)."""
        gaps = nn.functional.pad(self.rising.diff(dim=1), (1, 1))
        spacing = (gaps[:, 1:] + gaps[:, :-1]) / 2
        places = (self.sums[0].diff(dim=1).clamp(min=0).pow(1 / 3) * spacing.pow(2 / 3)).cumsum(dim=1)
        quantiles = places[:, -1:] * torch.arange(1, count, device=places.device) / count
        ends = torch.searchsorted(places, quantiles)
        return nn.functional.pad(nn.functional.pad(ends, (1, 0)), (0, 1), value=self.rising.shape[1])

    def _between(self, first: Int[Tensor, "out _n"], last: Int[Tensor, "out _n"]) -> Float[Tensor, "3 out _n"]:
        return self.sums.gather(2, last.expand(3, -1, -1)) - self.sums.gather(2, first.expand(3, -1, -1))

    def _cost(self, first: Int[Tensor, "out _n"], last: Int[Tensor, "out _n"]) -> Float[Tensor, "out _n"]:
        """sum share (x - mean)^2."""
        mass, mean, square = self._between(first, last)
        return (square - mean.square() / mass.clamp(min=SMALLEST)).clamp(min=0)

    def _split(
        self, edges: Int[Tensor, "out _edge"]
    ) -> tuple[Float[Tensor, "out _cluster"], Int[Tensor, "out _cluster"]]:
        """What the best split of each cluster gains, and where it is; -inf: there is none."""
        places = torch.arange(1, self.rising.shape[1], device=edges.device).expand(len(edges), -1).contiguous()
        own = torch.searchsorted(edges[:, 1:-1].contiguous(), places, right=True)
        first, last = edges.gather(1, own), edges.gather(1, own + 1)
        gains = self._cost(first, last) - self._cost(first, places) - self._cost(places, last)
        none = gains.new_full((len(edges), edges.shape[1] - 1), -torch.inf)
        best = none.scatter_reduce(1, own, gains, "amax")
        found = places.masked_fill(gains < best.gather(1, own), self.rising.shape[1])
        return best, torch.full_like(best, self.rising.shape[1], dtype=torch.long).scatter_reduce(1, own, found, "amin")

    def _settled(self, edges: Int[Tensor, "out _edge"], begin: int) -> Int[Tensor, "out _edge"]:
        """Every second edge, from `begin` on, where the two clusters that it parts cost least."""
        others = torch.ones(edges.shape[1], dtype=torch.bool, device=edges.device)
        others[begin:-1:2] = False
        joined, now = edges[:, others], edges[:, begin:-1:2]
        theirs = slice(begin - 1, begin - 1 + now.shape[1])
        first, last = joined[:, :-1][:, theirs], joined[:, 1:][:, theirs]
        gain = self._cost(first, last) - self._cost(first, now) - self._cost(now, last)
        best, place = (found[:, theirs] for found in self._split(joined))
        moved = edges.clone()
        moved[:, begin:-1:2] = torch.where(self._better(best, gain), place, now)
        return moved

    def _exchanged(self, edges: Int[Tensor, "out _edge"]) -> Int[Tensor, "out _edge"]:
        """One edge less and another more, in rows where that helps."""
        gains, places = self._split(edges)
        gain, cut = gains.max(dim=1, keepdim=True)
        apart = self._cost(edges[:, :-1], edges[:, 1:])
        joined = self._cost(edges[:, :-2], edges[:, 2:]) - apart[:, :-1] - apart[:, 1:]
        numbers = torch.arange(joined.shape[1], device=edges.device)
        cost, gone = joined.masked_fill((numbers == cut) | (numbers == cut - 1), torch.inf).min(dim=1, keepdim=True)
        changed = edges.scatter(1, gone + 1, places.gather(1, cut)).sort(dim=1).values
        return torch.where(self._better(gain, cost), changed, edges)

    def _better(self, gain: Float[Tensor, "out _n"], cost: Float[Tensor, "out _n"]) -> Bool[Tensor, "out _n"]:
        """By more than rounding, so that there is an end."""
        return gain > cost + 1e-12 * self.sums[2, :, -1:]
