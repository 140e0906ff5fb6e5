"""SparseGrad: a linear is tuned in coordinates in which its gradient is sparse (Chekalina et al., arXiv 2410.07383).

    W~ = P^T W Q,   G~ = P^T G Q with its k largest |entries| alone;   W~ by AdamW,   W = P W~ Q^T

P and Q are a HOSVD of gradients G_n of a few steps, of all linears of a kind and a shape (`mlp.up_proj` of every
block; a shared expert's has another): P the eigenvectors of sum_n G_n G_n^T, Q those of sum_n G_n^T G_n, the same
subspaces as the singular vectors of the unfoldings without an unfolding in memory. The authors' code has Q transposed:
it is still orthogonal, but no longer the basis. On stories260K the largest 1 % of the entries of a new gradient of `up`
hold 0.35 of its energy in these coordinates, 0.22 in plain ones and 0.20 in theirs. It also takes the k-th largest
signed entry for a threshold of |entries|, so that about 2 k are kept; here k are, ties to the first. As there, G is the
gradient of what passes the model together (`micro_batch`), and a step sums what is kept of each. They gather while
the model is tuned as usual, here it stands still meanwhile; and of a Llama they tune up_proj and down_proj of every
third block, here `kinds` of every block.

For dense models alone: each entry of W~ moves all of W, so that no zero of W would stay. For one process: the bases are
those of the gradients that it has seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from besa_exp.recovery.descent import Adam, Descent, taking_gradients
from besa_exp.recovery.keep_bits import parameters_of_linears, sparsity_of
from besa_exp.recovery.tuner import Objective, Taken, Windows
from besa_exp.rules import Count, Share, check_fields
from besa_exp.tensors.keep_bits import KeepBits, put_kept
from besa_exp.tensors.masks import keep_largest
from besa_exp.tensors.statistics import is_finite

Matrix = Float[Tensor, "out in"]


@dataclass(frozen=True)
class SparseGrad:
    """`share` of the entries of a gradient is kept; the first `gather` steps only gather gradients. `kinds`: the ends
    of the names of the linears that are tuned."""

    adam: Adam = field(default_factory=lambda: Adam(lr=1e-4))
    share: Share = 0.01
    gather: Count = 10
    kinds: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        check_fields(self, "recovery")
        if not self.kinds:
            raise ValueError("recovery.kinds=[]: names no linear to tune; write for example recovery.kinds=[up_proj]")

    def begin(self, model: nn.Module, keep: Mapping[str, KeepBits], seed: int) -> SparseGradTuner:
        """Of a model that has linears of these kinds (`recipe.check_fit`). ValueError: it is pruned."""
        if keep:
            raise ValueError(no_zero_stays(sparsity_of(model, keep)))
        return SparseGradTuner(model, self)


def no_zero_stays(sparsity: float) -> str:
    """Why a pruned model is not tuned so."""
    return (
        "recovery=sparsegrad: each of its steps moves all weights of a linear, so that none of the "
        f"{sparsity:.0%} zeros of this model would stay; use recovery=full or lora"
    )


@dataclass(frozen=True)
class Rotated:
    """A tensor in other coordinates."""

    rotated: Matrix
    P: Float[Tensor, "out out"]
    Q: Float[Tensor, "in in"]
    count: int

    @property
    def trained(self) -> Mapping[str, Tensor]:
        return {"rotated": self.rotated}

    def write(self, parameter: Tensor) -> None:
        put_kept(self.P @ self.rotated @ self.Q.T, parameter, None)

    def gradients(self, gradient: Tensor) -> Mapping[str, Tensor]:
        """The largest entries of P^T G Q."""
        return {"rotated": largest(self.P.T @ gradient.to(self.P.dtype) @ self.Q, self.count)}


class SparseGradTuner:
    """A tuner (`tuner.Tuner`): it gathers gradients over the first steps, then descends in the coordinates that they
    give."""

    def __init__(self, model: nn.Module, settings: SparseGrad) -> None:
        self.model, self.settings, self.keep = model, settings, {}
        self.kinds = kinds_in(model, settings.kinds)
        self.parameters = {name: model.get_parameter(name) for name in self.kinds}
        self.products: dict[str, tuple[Tensor, Tensor]] = {}
        self.descent: Descent | None = None

    def step(self, objective: Objective, windows: Windows, number: int, scale: float) -> Taken:
        """One step; the first only look."""
        if number < self.settings.gather:
            before = dict(self.products)
            with taking_gradients(self.parameters, self._gather):
                loss, _ = objective.differentiate(windows)
            finite = all(is_finite(products) for both in self.products.values() for products in both)
            if not (math.isfinite(loss) and finite):
                self.products = before
            return Taken(loss, None if finite else math.inf)
        if self.descent is None:
            self.descent = self._descent()
        return self.descent.step(objective, windows, number, scale)

    def ready(self) -> AbstractContextManager[None]:
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        """The sums of products of gradients, and what the descent holds."""
        sums = {
            f"{kind}.{side}": both[place] for kind, both in self.products.items() for place, side in enumerate("PQ")
        }
        return sums | (self.descent.state() if self.descent else {})

    def load(self, state: Mapping[str, Tensor]) -> None:
        device = next(iter(self.parameters.values())).device
        kinds = [name.removesuffix(".P") for name in state if name.endswith(".P")]
        for kind in kinds:
            both = (state[f"{kind}.{side}"].to(device, copy=True) for side in "PQ")
            self.products[kind] = (next(both), next(both))
        if any("/" in name for name in state):
            self.descent = self._descent()
            self.descent.load(state)

    def _gather(self, name: str, gradient: Tensor) -> None:
        kind, found = self.kinds[name], gradient.float()
        own = (found @ found.T, found.T @ found)
        before = self.products.get(kind)
        self.products[kind] = own if before is None else (before[0] + own[0], before[1] + own[1])

    @torch.no_grad()
    def _descent(self) -> Descent:
        bases = {kind: (basis(left), basis(right)) for kind, (left, right) in self.products.items()}
        forms = {}
        for name, parameter in self.parameters.items():
            P, Q = bases[self.kinds[name]]
            rotated = P.T @ parameter.detach().float() @ Q
            forms[name] = Rotated(rotated, P, Q, max(1, math.floor(self.settings.share * rotated.numel())))
        return Descent(self.model, forms, self.settings.adam, {})


def kinds_in(model: nn.Module, kinds: Sequence[str]) -> dict[str, str]:
    """The kind and the shape of each linear of these kinds, such as `up_proj 172x64`; stacks of experts are none."""
    found = {}
    for name, parameter in parameters_of_linears(model).items():
        kind = next((kind for kind in kinds if name.endswith(f"{kind}.weight")), None)
        if kind is not None and parameter.dim() == 2:
            found[name] = f"{kind} {len(parameter)}x{parameter.shape[1]}"
    return found


def basis(products: Float[Tensor, "side side"]) -> Float[Tensor, "side side"]:
    """Orthonormal eigenvectors as columns, of the largest eigenvalue first; computed in fp64."""
    return torch.linalg.eigh(products.double()).eigenvectors.flip(1).to(products.dtype)


def largest(gradient: Matrix, count: int) -> Matrix:
    """The same with 0 in the place of all but the `count` entries of the largest size; of equals the first stay."""
    backwards = gradient.abs().flatten().flip(0)[None]  # of equals the first go in a row
    keep_mask = keep_largest(backwards, backwards.numel() - count).flip(1).view_as(gradient)
    return gradient.masked_fill(~keep_mask, 0)
