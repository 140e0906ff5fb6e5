"""SpIEL: a few entries of each linear are tuned, and which ones they are is learned (Ansell et al., arXiv 2401.16405).

    W = W_0 + scatter(indices, deltas);   k = floor(N |W| / sum |W|) entries a linear, N = density * parameters

From time to time some entries give way to others. The d = floor(p k) ones with the least |delta| go; what comes has

    ag:   the largest |sum of gradients|, over a few steps, among candidates: the k largest of the first gradient
    sm3:  the largest r_i c_j, the row and column accumulators of SM3 (arXiv 1901.11150)

and begins with delta 0; p is 1 at the first time, then p0 (1 - t/T). `ag` steps by an Adam whose bias correction is
each entry's own, by its age, and seeds the moments of what comes with the gathered means. An age is an integer: the
authors' is of the optimizer state's dtype, and in bf16 it stays 1 for ever. What is gathered here are the gradients
of whole steps; theirs are those of micro-batches, so that with gradient accumulation their seeds are smaller than what
Adam then takes.

Indices stay inside the mask, so that zeros stay; candidates are of the masked gradient. `exchange=true` lets them
leave: a pruned place that comes takes the place of an entry that goes, which is pruned then. The number of zeros stays,
and the mask is learned. Of those that go, the ones of the least |W_0| are pruned.

dL/dW of one linear at a time is formed; its entries at the indices are the gradient to the deltas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from besa_exp.recovery.descent import taking_gradients
from besa_exp.recovery.keep_bits import parameters_of_linears
from besa_exp.recovery.schedule import key_of
from besa_exp.recovery.tuner import Objective, Taken, Windows
from besa_exp.rules import Count, Fraction, NotNegative, Positive, Share, check_fields, one_of, within
from besa_exp.tensors.keep_bits import KeepBits, without_negative_zeros

BETAS, EPS = (0.9, 0.999), 1e-8
Entries = Float[Tensor, " entry"]
Places = Int[Tensor, " entry"]


@dataclass(frozen=True)
class Spiel:
    """`density`: the share of the model's parameters that is tuned. Every `reselect` steps entries are exchanged, after
    gradients of `gather` steps (one more after the first time, as the authors' code has it); `steps` is the number of
    all. `first`: p0. `decay` pulls deltas to 0."""

    steps: Count
    lr: Positive = 1e-3
    selection: Annotated[str, one_of("ag", "sm3")] = "ag"
    density: Fraction = 0.01
    reselect: Annotated[int, within(least=3)] = 20
    gather: Count = 5
    first: Share = 0.2
    decay: NotNegative = 0.0
    exchange: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "recovery")
        if self.gather > self.reselect - 2:
            raise ValueError(
                f"recovery.gather={self.gather}: must be at most {self.reselect - 2}, recovery.reselect - 2; lower "
                "it, or raise recovery.reselect"
            )
        if self.exchange and self.selection == "sm3":
            raise ValueError("recovery.exchange=true: needs recovery.selection=ag; sm3 knows nothing of pruned places")

    def begin(self, model: nn.Module, keep: Mapping[str, KeepBits], seed: int) -> SpielTuner:
        """Entries drawn uniformly from the kept places of each linear. For one process (`recipe.check_fit`)."""
        return SpielTuner(model, self, keep, seed)

    def gathers_at(self, step: int) -> bool:
        """Whether gradients of this step, which counts from 0, choose what comes."""
        in_turn = step % self.reselect
        return in_turn < self.gather or (in_turn == self.reselect - 1)

    def exchanges_after(self, done: int) -> bool:
        """Whether entries are exchanged once so many steps are done; not after the last: what came would stay at 0."""
        return done % self.reselect == self.gather and done < self.steps

    def proportion(self, done: int) -> float:
        """p."""
        return 1.0 if done < self.reselect else self.first * (1 - done / self.steps)


@dataclass
class Tuned:
    """The tuned entries of one linear. `base`: W_0 there. With `ag`: moments and `age`, the number of the next step of
    each, and what the phase under way has gathered at its `candidates` (sums of g and g^2 over `gathered` steps). With
    `sm3`: the accumulators."""

    indices: Places
    base: Tensor
    deltas: Entries
    age: Places
    moment: Entries
    square: Entries
    rows: Float[Tensor, " out"]
    columns: Float[Tensor, " in"]
    candidates: Int[Tensor, " candidate"]
    sums: Float[Tensor, " candidate"]
    squares: Float[Tensor, " candidate"]
    gathered: Int[Tensor, ""]

    @staticmethod
    def at(indices: Places, weight: Float[Tensor, "out in"]) -> Tuned:
        """Entries that begin with the model's weights."""
        zeros = torch.zeros(len(indices), device=indices.device)
        return Tuned(
            indices=indices,
            base=weight.view(-1)[indices],
            deltas=zeros.clone(),
            age=torch.ones_like(indices, dtype=torch.int32),
            moment=zeros.clone(),
            square=zeros.clone(),
            rows=torch.zeros(weight.shape[0], device=indices.device),
            columns=torch.zeros(weight.shape[1], device=indices.device),
            candidates=indices.new_zeros(0),
            sums=zeros.new_zeros(0),
            squares=zeros.new_zeros(0),
            gathered=torch.zeros((), dtype=torch.int64),
        )


class SpielTuner:
    """A tuner (`tuner.Tuner`)."""

    def __init__(self, model: nn.Module, settings: Spiel, keep: Mapping[str, KeepBits], seed: int) -> None:
        self.settings, self.keep = settings, dict(keep)
        self.always = dict(keep) if settings.exchange else {}  # what was kept at all times: all else began at 0
        self.parameters = parameters_of_linears(model)
        self.gradients: dict[str, Entries] = {}
        self.at_candidates: dict[str, Tensor] = {}
        self.gathering = False
        counts = entries_of(model, settings.density)
        self.tuned = {
            name: Tuned.at(drawn_places(parameter, keep.get(name), counts[name], key_of(seed, name)), _flat(parameter))
            for name, parameter in self.parameters.items()
        }

    def step(self, objective: Objective, windows: Windows, number: int, scale: float) -> Taken:
        """One step of all deltas; then, where it is time, an exchange of entries."""
        self.gathering = self.settings.selection == "ag" and self.settings.gathers_at(number)
        with taking_gradients(self.parameters, self._take):
            loss, multiple = objective.differentiate(windows)
        for gathered in (self.gradients, self.at_candidates):
            for gradient in gathered.values():
                gradient.div_(multiple)
        squares = float(sum(gradient.double().square().sum() for gradient in self.gradients.values()))
        if math.isfinite(loss) and math.isfinite(squares):
            self._update(self.settings.lr * scale)
            if self.settings.exchanges_after(number + 1):
                self._exchange(self.settings.proportion(number + 1))
        self.gradients.clear()
        self.at_candidates.clear()
        return Taken(loss, math.sqrt(squares))

    def ready(self) -> AbstractContextManager[None]:
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        """Entries, their moments or accumulators, what the phase under way has gathered, and what is, and always was,
        kept."""
        entries = {f"{name}/{key}": value for name, tuned in self.tuned.items() for key, value in vars(tuned).items()}
        kept = {"keep": self.keep, "always": self.always}
        return entries | {  # copies: the two are one until the first exchange, and a file holds no tensor twice
            f"{name}/{key}": bits.bits.clone() for key, by_name in kept.items() for name, bits in by_name.items()
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            device, own = parameter.device, f"{name}/"
            found = {key.removeprefix(own): value for key, value in state.items() if key.startswith(own)}
            for key, by_name in (("keep", self.keep), ("always", self.always)):
                if name in by_name:
                    by_name[name] = KeepBits.packed(found.pop(key).to(device, copy=True), parameter.shape)
                    by_name[name].clear_(parameter)
            self.tuned[name] = Tuned(**{key: value.to(device, copy=True) for key, value in found.items()})
            self.tuned[name].gathered = found["gathered"].clone()
            self._write(name)

    def _take(self, name: str, gradient: Tensor) -> None:
        dense, tuned = _flat(gradient), self.tuned[name]
        own = dense.view(-1)[tuned.indices].float()
        self.gradients[name] = self.gradients[name].add_(own) if name in self.gradients else own
        if not self.gathering:
            return
        if not len(tuned.candidates):
            bits = None if self.settings.exchange else self.keep.get(name)
            tuned.candidates = largest_places(dense.abs(), bits, len(tuned.indices))
            tuned.sums = torch.zeros(len(tuned.candidates), device=gradient.device)
            tuned.squares = tuned.sums.clone()
        there = dense.view(-1)[tuned.candidates].float()
        self.at_candidates[name] = self.at_candidates[name].add_(there) if name in self.at_candidates else there

    @torch.no_grad()
    def _update(self, lr: float) -> None:
        for name, gradient in self.gradients.items():
            tuned = self.tuned[name]
            if self.settings.selection == "ag":
                adam_step(tuned, gradient, lr)
            else:
                sm3_step(tuned, gradient, lr)
            tuned.deltas.mul_(1 - lr * self.settings.decay)
            self._write(name)
        for name, there in self.at_candidates.items():
            tuned = self.tuned[name]
            tuned.sums += there
            tuned.squares += there.square()
            tuned.gathered += 1

    @torch.no_grad()
    def _exchange(self, proportion: float) -> None:
        for name, tuned in self.tuned.items():
            flat = self.parameters[name].view(-1)
            going = least_deltas(tuned.deltas, math.floor(proportion * len(tuned.indices)))
            if self.settings.selection == "ag":
                slots, coming = ag_exchange(tuned.indices, going, tuned.candidates, tuned.sums)
            else:
                slots, coming = sm3_exchange(tuned, going, self.keep.get(name))
            leaving, stays = tuned.indices[slots], torch.ones_like(slots, dtype=torch.bool)
            if self.settings.exchange and name in self.keep:
                slots, stays = self._move_zeros(name, slots, coming)
                leaving = tuned.indices[slots]
            flat[leaving] = torch.where(stays, tuned.base[slots], 0)
            tuned.base[slots] = flat[coming]
            tuned.indices[slots] = coming
            begin_anew(tuned, slots, coming)
            tuned.candidates, tuned.gathered = tuned.candidates.new_zeros(0), torch.zeros_like(tuned.gathered)
            tuned.sums, tuned.squares = tuned.sums.new_zeros(0), tuned.squares.new_zeros(0)

    def _move_zeros(self, name: str, slots: Tensor, coming: Tensor) -> tuple[Tensor, Tensor]:
        """The slots in an order in which pruned places that come meet the entries of the least |W_0|, which are pruned
        now, and which of the entries that leave stay in the mask."""
        mask, tuned = self.keep[name].mask().view(-1), self.tuned[name]
        stays = mask[coming]
        by_size = tuned.base[slots].float().abs().argsort(stable=True)
        pruned = by_size[: int((~stays).sum())]
        others = torch.ones_like(slots, dtype=torch.bool)
        others[pruned] = False
        ordered = torch.empty_like(slots)
        ordered[~stays], ordered[stays] = slots[pruned], slots[others]
        shape, always = self.keep[name].shape, self.always[name].mask().view(-1)
        mask[tuned.indices[ordered[~stays]]] = False
        self.always[name] = KeepBits.of((always & mask).view(shape))
        mask[coming] = True
        self.keep[name] = KeepBits.of(mask.view(shape))
        return ordered, stays

    def _write(self, name: str) -> None:
        """W_0 + deltas at the indices."""
        tuned, flat = self.tuned[name], self.parameters[name].view(-1)
        flat[tuned.indices] = without_negative_zeros((tuned.base.float() + tuned.deltas).to(flat.dtype))


def entries_of(model: nn.Module, density: float) -> dict[str, int]:
    """k of each linear: floor(N |W| / sum |W|), N = floor(density * parameters)."""
    sizes = {name: parameter.numel() for name, parameter in parameters_of_linears(model).items()}
    every, total = math.floor(density * sum(own.numel() for own in model.parameters())), sum(sizes.values())
    return {name: every * size // total for name, size in sizes.items()}


def drawn_places(parameter: Tensor, keep: KeepBits | None, count: int, key: int) -> Places:
    """`count` of the kept places, or all there are, drawn without replacement on the CPU, in rising order."""
    among = parameter.numel() if keep is None else keep.count
    chosen = torch.randperm(among, generator=torch.Generator().manual_seed(key))[:count].sort().values
    chosen = chosen.to(parameter.device)
    return chosen if keep is None else keep.places()[chosen]


def largest_places(scores: Float[Tensor, "out in"], keep: KeepBits | None, count: int) -> Places:
    """The places of the `count` largest scores among the kept ones, falling."""
    if keep is None:
        return scores.reshape(-1).topk(min(count, scores.numel())).indices
    places = keep.places()
    return places[scores.reshape(-1)[places].topk(min(count, len(places))).indices]


def least_deltas(deltas: Entries, count: int) -> Int[Tensor, " slot"]:
    """The slots of the `count` least |delta|, rising."""
    return deltas.abs().argsort(stable=True)[:count]


def ag_exchange(
    indices: Places,
    going: Int[Tensor, " slot"],
    candidates: Int[Tensor, " candidate"],
    sums: Float[Tensor, " candidate"],
) -> tuple[Int[Tensor, " moved"], Int[Tensor, " moved"]]:
    """Which slots get which places: of the candidates that are not tuned by what stays, the largest |sum|, as many as
    go. What goes and comes at once stays as it is; of the others the slot of the least |delta| gets the largest."""
    staying = torch.ones_like(indices, dtype=torch.bool)
    staying[going] = False
    free = ~torch.isin(candidates, indices[staying])
    places = candidates[free]
    coming = places[sums[free].abs().argsort(descending=True, stable=True)[: len(going)]]
    both = torch.isin(coming, indices[going])
    slots = going[~torch.isin(indices[going], coming)]
    coming = coming[~both]
    return slots[: len(coming)], coming[: len(slots)]


def sm3_exchange(
    tuned: Tuned, going: Int[Tensor, " slot"], keep: KeepBits | None
) -> tuple[Int[Tensor, " moved"], Int[Tensor, " moved"]]:
    """Which slots get which places: those of the largest r_i c_j that are not tuned."""
    scores = torch.outer(tuned.rows, tuned.columns)
    scores.view(-1)[tuned.indices] = -1
    coming = largest_places(scores, keep, len(going))
    coming = coming[scores.view(-1)[coming] >= 0]
    return going[: len(coming)], coming


def begin_anew(tuned: Tuned, slots: Int[Tensor, " moved"], coming: Int[Tensor, " moved"]) -> None:
    """Deltas of 0, and the moments that n gathered gradients would have left: age n, and bias-corrected means of g and
    g^2 that are plain ones."""
    tuned.deltas[slots] = 0
    tuned.age[slots] = 1
    tuned.moment[slots] = tuned.square[slots] = 0
    n = int(tuned.gathered)
    if n == 0 or not len(slots):
        return
    order = tuned.candidates.argsort()
    found = order[torch.searchsorted(tuned.candidates[order], coming)]
    tuned.age[slots] = n
    tuned.moment[slots] = tuned.sums[found] / n * (1 - BETAS[0] ** n)
    tuned.square[slots] = tuned.squares[found] / n * (1 - BETAS[1] ** n)


def adam_step(tuned: Tuned, gradient: Entries, lr: float) -> None:
    """delta -= lr m^ / (sqrt(v^) + e'), the bias correction by each entry's age; e is inside it, as in the authors'
    code: lr m / ((sqrt(v) + e) (1 - b1^age) / sqrt(1 - b2^age))."""
    b1, b2 = BETAS
    tuned.moment.mul_(b1).add_(gradient, alpha=1 - b1)
    tuned.square.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
    age = tuned.age.float()
    correction = (1 - b1**age) / (1 - b2**age).sqrt()
    tuned.deltas.sub_(lr * tuned.moment / ((tuned.square.sqrt() + EPS) * correction))
    tuned.age += 1


def sm3_step(tuned: Tuned, gradient: Entries, lr: float) -> None:
    """v = min(r_i, c_j) + g^2;  r_i and c_j become the greatest v of their entries;  delta -= lr g / sqrt(v + e)."""
    width = len(tuned.columns)
    row, column = tuned.indices // width, tuned.indices % width
    v = torch.minimum(tuned.rows[row], tuned.columns[column]) + gradient.square()
    tuned.rows.scatter_reduce_(0, row, v, "amax")
    tuned.columns.scatter_reduce_(0, column, v, "amax")
    tuned.deltas.sub_(lr * gradient / (v + EPS).sqrt())


def _flat(parameter: Tensor) -> Float[Tensor, "out in"]:
    """A stack of experts as one matrix."""
    return parameter.detach().reshape(-1, parameter.shape[-1])
