"""What a structure method is: it is shown the dense model and says which whole parts of it stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.head import Head
from besa_exp.checkpoints.structure import Costs, Dimensions, Structure
from besa_exp.errors import RunError
from besa_exp.machine import distributed
from besa_exp.methods.budgets.budget import Work
from besa_exp.methods.budgets.progress import Progress


@dataclass(frozen=True)
class DenseModel:
    """`blocks` gives the dense blocks in order, as often as it is called, each with its weights while it is out;
    `inputs` a copy of what enters the first, which may be overwritten; `input_ids`: the calibration tokens, of the
    samples that this rank owns."""

    blocks: Callable[[], Iterable[Block]]
    inputs: Callable[[], Hidden]
    head: Callable[[], Head]
    input_ids: Int[Tensor, "sample seq"]
    costs: Costs
    dimensions: Dimensions
    batch_size: int

    @property
    def num_samples(self) -> int:
        """Of all ranks."""
        return distributed.total(len(self.input_ids))

    def outputs(self) -> Hidden:
        """Of the last block."""
        states = self.inputs()
        for block in self.blocks():
            block.outputs(states, self.batch_size, out=states)
        return states


def check_chosen(method: object, chosen: object, dimensions: Dimensions) -> None:
    """RunError: what a method chose is no part of a model of these dimensions."""
    what = f"structure={type(method).__name__}: choose"
    if not isinstance(chosen, Structure):
        raise RunError(f"{what} gave {type(chosen).__name__}, not a Structure (docs/extending.md)")
    units = [kept for units in (chosen.groups, chosen.channels) for kept in units or ()]
    if odd := [number for kept in (chosen.blocks, *units) for number in kept if not isinstance(number, int)]:
        raise RunError(f"{what} gave the number {odd[0]!r}; numbers are Python's own, as .tolist() makes them")
    if problems := chosen.problems(dimensions):
        raise RunError(f"{what} gave no part of this model: {problems[0].removeprefix('structure: ')}")


@runtime_checkable
class CountedSearch(Protocol):
    """A structure method that says what its search asks for."""

    def work(self, costs: Costs, num_samples: int, batch_size: int) -> Work:
        """Of a model of these costs, at most."""
        ...


@runtime_checkable
class StructureMethod(Protocol):
    """A method that removes blocks, or narrows them (`narrows`); it changes no weight."""

    @property
    def narrows(self) -> bool:
        """Whether groups of heads and channels go, and no block."""
        ...

    @property
    def saved_as(self) -> str | None:
        """How blocks of uneven widths are saved, one of SAVED_AS; None: all blocks are as wide as the others."""
        ...

    def check(self, costs: Costs, dimensions: Dimensions) -> list[str]:
        """Problems with a model of these costs, in complete sentences, before any weight is read."""
        ...

    def choose(self, dense: DenseModel, progress: Progress, on_progress: Callable[[str], None]) -> Structure:
        """What stays. `progress` holds what an attempt that was killed had found, and is kept for the reader;
        `on_progress` is called with how far it is."""
        ...
