"""What a pruner is, and what it decides about one block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.reports import Step
from besa_exp.tensors.masks import Target
from besa_exp.tensors.statistics import Statistic


@dataclass(frozen=True)
class PrunedBlock:
    """What a pruner decided: the keep mask of every linear [out in], new weights where the kept ones moved, the
    sparsity allocated to every row [out], and a search's course; `loss_before` is the probe samples' loss where the
    search or update began (None: nothing was searched or updated). `norms`: new values of norms' parameters, by path.
    `permutations`: the order of a linear's inputs in which its mask is N:M, where that is not their own.

    `_out` and `_in` are of each linear its own, in whatever order the linears come."""

    keep_masks: Mapping[str, Bool[Tensor, "_out _in"]]
    allocated: Mapping[str, Float[Tensor, " _out"]]
    weights: Mapping[str, Float[Tensor, "_out _in"]] | None = None
    loss_before: float | None = None
    steps: tuple[Step, ...] = ()
    norms: Mapping[str, Float[Tensor, " _size"]] = field(default_factory=dict)
    permutations: Mapping[str, Int[Tensor, " _in"]] = field(default_factory=dict)


def pruned_by_masks(keep_masks: Mapping[str, Bool[Tensor, "out in"]]) -> PrunedBlock:
    """The result of a method that decides masks alone, in one go."""
    return PrunedBlock(keep_masks, {name: 1 - mask.float().mean(dim=1) for name, mask in keep_masks.items()})


def joined(parts: Sequence[PrunedBlock]) -> PrunedBlock:
    """The parts of a block as one, with the first one's `loss_before`."""
    weights = {name: weight for part in parts for name, weight in (part.weights or {}).items()}
    return PrunedBlock(
        keep_masks={name: mask for part in parts for name, mask in part.keep_masks.items()},
        allocated={name: rows for part in parts for name, rows in part.allocated.items()},
        weights=weights or None,
        loss_before=parts[0].loss_before,
        steps=tuple(step for part in parts for step in part.steps),
    )


@runtime_checkable
class Pruner(Protocol):
    """A method knows one block, its inputs, the targets and the statistics; never a model, a data set or a config."""

    @property
    def statistic(self) -> type[Statistic] | None:
        """What to observe about the inputs of each linear; None: nothing."""
        ...

    @property
    def dense_targets(self) -> bool:
        """Whether targets come from dense inputs (else: the dense block on the pruned prefix's outputs)."""
        ...

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Problems with this target, in complete sentences."""
        ...

    def prune_block(
        self,
        block: Block,
        inputs: Hidden,
        targets: Hidden,
        statistics: Mapping[str, Any],
        target: Target,
        on_step: Callable[[Step], None],
    ) -> PrunedBlock:
        """Decide the block's masks (and weights). Must not change the block."""
        ...
