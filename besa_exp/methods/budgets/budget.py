"""What a budget over depth is, and how its fractions become whole numbers of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.observation import Observed
from besa_exp.errors import RunError
from besa_exp.methods.allocation import project_to_budget
from besa_exp.tensors import kernels
from besa_exp.tensors.importance import Importance, ImportanceName
from besa_exp.tensors.masks import Goal, round_to_total

T = TypeVar("T")


@runtime_checkable
class Budget(Protocol):
    """A method that knows the dense blocks and their inputs, and decides how much each gives up."""

    def sparsities(
        self, blocks: Iterable[Block], inputs: Hidden, sparsity: float, batch_size: int
    ) -> Float[Tensor, " block"]:
        """The sparsity of each block in order, `sparsity` in the mean or near it; `exact_goals` makes them meet the
        total. Goes through all blocks once, must not change them, and may overwrite the `inputs` of the first."""
        ...


@dataclass(frozen=True)
class Work:
    """What a budget asks for at most, of the whole model: a block pruned to a sparsity, a sample through a block, and a
    sample through the head."""

    prunings: int
    passes: int
    predictions: int = 0

    def seconds_of_passes(self, seq_len: int, in_block: float, outside: float) -> float:
        """Where a token of a sample takes so many seconds in a block, and outside the blocks."""
        return seq_len * (self.passes * in_block + self.predictions * outside)


@runtime_checkable
class Counted(Protocol):
    """A budget that says what it asks for: what a pass over the blocks does not show."""

    @property
    def importance(self) -> Importance | ImportanceName:
        """What blocks are pruned by."""
        ...

    def work(self, num_blocks: int, num_samples: int, seq_len: int, sparsity: float) -> Work: ...


def survey(
    blocks: Iterable[Block],
    inputs: Hidden,
    importance: Importance,
    batch_size: int,
    measure: Callable[[Block, Observed], T],
) -> list[T]:
    """One pass of the dense model: what `measure` makes of each block and of what was observed about it. The inputs are
    overwritten."""
    measured = []
    for block in blocks:
        observed, _ = Observed.of(importance, block, inputs, batch_size, inputs)
        measured.append(measure(block, observed))
    return measured


@torch.no_grad()
def pruned_to(block: Block, observed: Observed, sparsities: Iterable[float]) -> Iterator[dict[str, Tensor]]:
    """The block's weights, pruned to each of the sparsities, the same in every row."""
    weights = block.weights
    ranks = {name: kernels.rank_in_row(observed.score(block, name)) for name in weights}
    for sparsity in sparsities:
        counts = {name: torch.full_like(rank[:, 0], int(rank.shape[1] * sparsity)) for name, rank in ranks.items()}
        yield {name: kernels.masked_weight(weight, ranks[name], counts[name]) for name, weight in weights.items()}


def around(shares: Float[Tensor, " block"], center: float, width: float) -> Float[Tensor, " block"]:
    """`shares` stretched to the width `width` and moved so that their mean is `center`; all equal where they are."""
    spread = shares.max() - shares.min()
    scaled = width * (shares - shares.min()) / spread if spread > 0 else torch.zeros_like(shares)
    return center + scaled - scaled.mean()


def exact_goals(sparsities: object, weights: Sequence[int], sparsity: float) -> list[Goal]:
    """A goal for each block such that round(sparsity * sum(weights)) weights go in all: the sparsities [block] that a
    budget gave, clipped to [0, 1], are moved by one shift and rounded by largest remainder. `weights`: of the linears
    of each block. RunError: they are not a sparsity for each block."""
    told = f"the budget gives a tensor of {len(weights)} sparsities, one a block"
    if not isinstance(sparsities, Tensor):
        raise RunError(f"{told}, not {type(sparsities).__name__}")
    if sparsities.shape != (len(weights),):
        raise RunError(f"{told}, not one of the shape {[*sparsities.shape]}")
    if wrong := [number for number, one in enumerate(sparsities.isfinite().tolist()) if not one]:
        raise RunError(f"block {wrong[0]} of the budget is {float(sparsities[wrong[0]])}; choose another budget")
    if not 0 <= (mean := float(sparsities.double().mean())) <= 1:
        raise RunError(f"{told}, in [0, 1] and {sparsity:g} in the mean or near it, not {mean:g}")
    capacity = torch.tensor(weights, dtype=torch.float64)
    total = round(sparsity * sum(weights))
    wanted = project_to_budget(sparsities.double().cpu(), capacity, total)
    counts = round_to_total(wanted * capacity, total)
    return [Goal(int(count) / size, exact=True) for count, size in zip(counts, weights, strict=True)]
