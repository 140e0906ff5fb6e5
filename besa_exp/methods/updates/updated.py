"""A pruner followed by an update: the pruner decides the keep masks, the update the weights under them, or what else
is kept in the place of what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from besa_exp.blocks.pruner import PrunedBlock, Pruner, Task, Traits
from besa_exp.errors import RunError
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.statistics import InputNorm


@runtime_checkable
class Update(Protocol):
    """A method that knows one block and the masks it was given. It never decides how many weights go."""

    @property
    def traits(self) -> Traits:
        """`statistic` takes the place of the pruner's (None: what the pruner asks for stays). It has a `squared_norm`
        as `InputNorm` has it, so that pruners which ask for that take it too."""
        ...

    def check(self, pattern: str) -> list[str]:
        """Problems with this pattern, in complete sentences."""
        ...

    def update_block(self, task: Task, pruned: PrunedBlock) -> PrunedBlock:
        """Decide the weights, or exchange kept ones for pruned ones within the goal. Must not change the block."""
        ...


@dataclass(frozen=True)
class Updated:
    """A pruner itself: what `pruner` gives, with the weights of `update`."""

    pruner: Pruner
    update: Update

    @property
    def traits(self) -> Traits:
        """The pruner's, with the statistic that the update asks for, and dense targets where one of the two does; blind
        where both are."""
        own, update = self.pruner.traits, self.update.traits
        dense_targets = own.dense_targets or update.dense_targets
        statistic, blind = update.statistic or own.statistic, own.blind and update.blind
        under_pattern = update.statistic or own.under_pattern
        return replace(own, statistic=statistic, dense_targets=dense_targets, blind=blind, under_pattern=under_pattern)

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """The pruner's problems and the update's, and a pruner that rounds, or needs another statistic than the update
        observes."""
        problems = [*self.pruner.check(sparsity, pattern), *self.update.check(pattern)]
        own, goal = self.pruner.traits, Goal.parse(sparsity, pattern)
        observed, update = own.observed(goal), f"update={type(self.update).__name__.lower()}"
        if own.quantiser:
            problems = [*problems, f"{update}: moves the weights that the pruner rounds; leave the update out"]
        given = self.traits.observed(goal)
        if observed in (None, given) or (observed is InputNorm and hasattr(given, "squared_norm")):
            return problems
        remedy = "choose another pruner, such as wanda, or another update"
        if observed is InputNorm and given:
            remedy = f"give {given.__name__} a squared_norm as InputNorm has it, or take pruner=magnitude"
        return [
            *problems,
            f"{update}: cannot follow pruner {type(self.pruner).__name__.lower()}, which needs the "
            f"{observed.__name__} of the inputs and not what the update observes; {remedy}",
        ]

    def prune_block(self, task: Task) -> PrunedBlock:
        """First the pruner, then the update, its steps numbered on."""
        # The pruner may forget what was observed, of which the update is given the rest
        pruned = self.pruner.prune_block(replace(task, statistics={**task.statistics}, gradients={**task.gradients}))
        done = len(pruned.steps)
        updated = self.update.update_block(task.after(done), replace(pruned, steps=()))
        _check_updated(f"{task.block.name}: update={type(self.update).__name__.lower()}", updated, pruned)
        return replace(updated, steps=(*pruned.steps, *updated.after(done).steps))


def _check_updated(what: str, updated: object, pruned: PrunedBlock) -> None:
    """RunError: what an update gave is no decision, or other numbers of weights go than the pruner chose."""
    if not isinstance(updated, PrunedBlock):
        raise RunError(f"{what} gave {type(updated).__name__}, not a PrunedBlock (docs/extending.md)")
    if updated.keep_masks is not pruned.keep_masks:
        before, after = (int(sum(mask.sum() for mask in one.keep_masks.values())) for one in (pruned, updated))
        if before != after:
            raise RunError(f"{what} keeps {after} weights where the pruner kept {before}; it exchanges them at most")


def with_update(pruner: Pruner, update: Update | None) -> Pruner:
    """`pruner` itself where there is no update."""
    return pruner if update is None else Updated(pruner, update)
