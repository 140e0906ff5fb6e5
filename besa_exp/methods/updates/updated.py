"""A pruner followed by an update: the pruner decides the keep masks, the update the weights under them, or what else
is kept in the place of what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.pruner import PrunedBlock, Pruner
from besa_exp.blocks.reports import Step
from besa_exp.tensors.masks import Target
from besa_exp.tensors.quantisation import quantiser_of
from besa_exp.tensors.statistics import InputNorm, Statistic


@runtime_checkable
class Update(Protocol):
    """A method that knows one block and the masks it was given. It never decides how many weights go."""

    @property
    def statistic(self) -> type[Statistic] | None:
        """What to observe about the inputs of each linear, in the place of the pruner's; None: what the pruner wants.
        It has a `squared_norm` as `InputNorm` has it, so that pruners which want that take it too."""
        ...

    @property
    def dense_targets(self) -> bool:
        """Whether targets must come from dense inputs."""
        ...

    def update_block(
        self,
        block: Block,
        inputs: Hidden,
        targets: Hidden,
        statistics: Mapping[str, Any],
        pruned: PrunedBlock,
        target: Target,
        on_step: Callable[[Step], None],
    ) -> PrunedBlock:
        """Decide the weights, or exchange kept ones for pruned ones within the target. Must not change the block."""
        ...


@dataclass(frozen=True)
class Updated:
    """A pruner itself: what `pruner` gives, with the weights of `update`."""

    pruner: Pruner
    update: Update

    @property
    def statistic(self) -> type[Statistic] | None:
        """The update's, else the pruner's."""
        return self.update.statistic or self.pruner.statistic

    @property
    def dense_targets(self) -> bool:
        """Whether one of the two wants them."""
        return self.pruner.dense_targets or self.update.dense_targets

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """The pruner's problems, and a pruner that rounds, or needs another statistic than the update observes."""
        problems = self.pruner.check(sparsity, pattern)
        if quantiser_of(self.pruner):
            update = f"update={type(self.update).__name__.lower()}"
            problems = [*problems, f"{update}: moves the weights that the pruner rounds; leave the update out"]
        if self.pruner.statistic in (None, InputNorm, self.statistic):
            return problems
        return [
            *problems,
            f"update={type(self.update).__name__.lower()}: cannot follow pruner "
            f"{type(self.pruner).__name__.lower()}, which needs the {self.pruner.statistic.__name__} of the inputs "
            "and not what the update observes; choose another pruner, such as wanda, or another update",
        ]

    def prune_block(
        self,
        block: Block,
        inputs: Hidden,
        targets: Hidden,
        statistics: Mapping[str, Any],
        target: Target,
        on_step: Callable[[Step], None],
    ) -> PrunedBlock:
        """First the pruner, then the update; the update's steps are counted on."""
        pruned = self.pruner.prune_block(block, inputs, targets, statistics, target, on_step)
        done = len(pruned.steps)

        def on_later_step(step: Step) -> None:
            on_step(replace(step, step=step.step + done))

        updated = self.update.update_block(block, inputs, targets, statistics, pruned, target, on_later_step)
        later = tuple(replace(step, step=step.step + done) for step in updated.steps)
        return replace(updated, steps=(*pruned.steps, *later))


def with_update(pruner: Pruner, update: Update | None) -> Pruner:
    """`pruner` itself where there is no update."""
    return pruner if update is None else Updated(pruner, update)
