"""What a pruner is: it is given a `Task`, one block to prune, and returns a `PrunedBlock`. What the block loop has to
know about it beforehand are its `Traits`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.observation import Observed
from besa_exp.blocks.reports import ModelStep, Step
from besa_exp.blocks.whole_model import Found, Whole
from besa_exp.tensors.importance import Importance
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.quantisation import Quantiser
from besa_exp.tensors.statistics import Statistic


@dataclass(frozen=True)
class Task:
    """One block to prune. `inputs` enter it after the pruned blocks before it, `targets` are what it should make of
    them, both of the samples that this rank owns. `statistics`: of every linear, as the pruner's traits ask. `goal`:
    what the block gives up. `on_step` is called with every step of a search. `gradients`: where the traits ask for
    them, the mean square over samples of the gradient to every weight."""

    block: Block
    inputs: Hidden
    targets: Hidden
    statistics: dict[str, Any]
    goal: Goal
    on_step: Callable[[Step], None] = lambda step: None
    gradients: dict[str, Float[Tensor, "_out _in"]] = field(default_factory=dict)

    def score(self, importance: Importance, name: str) -> Float[Tensor, "out in"]:
        """The importance of one linear's weights. RunError: it is no number for each of them."""
        return Observed(importance, self.statistics, self.gradients).score(self.block, name)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The dense weights by linear. They must not be changed."""
        return self.block.weights

    def forget(self) -> None:
        """Free what was observed, as much as the weights or more: whoever holds this task reads it no more."""
        self.statistics.clear()
        self.gradients.clear()

    def after(self, done: int) -> Task:
        """The same task, its steps numbered from `done`."""
        return replace(self, on_step=lambda step: self.on_step(replace(step, step=step.step + done)))


@dataclass(frozen=True)
class PrunedBlock:
    """What a pruner decided: the keep mask of every linear [out in], new weights where the kept ones moved, the
    sparsity allocated to every row [out], and a search's course; `loss_before` is the probe samples' loss where the
    search or update began (None: nothing was searched or updated). `norms`: new values of norms and biases that the
    block has, by path.
    `permutations`: the order of a linear's inputs in which its mask is N:M, where that is not their own.

    `_out` and `_in` are of each linear its own, in whatever order the linears come."""

    keep_masks: Mapping[str, Bool[Tensor, "_out _in"]]
    allocated: Mapping[str, Float[Tensor, " _out"]]
    weights: Mapping[str, Float[Tensor, "_out _in"]] | None = None
    loss_before: float | None = None
    steps: tuple[Step, ...] = ()
    norms: Mapping[str, Float[Tensor, " _size"]] = field(default_factory=dict)
    permutations: Mapping[str, Int[Tensor, " _in"]] = field(default_factory=dict)

    def after(self, done: int) -> PrunedBlock:
        """The same decision, its steps numbered from `done`."""
        return replace(self, steps=tuple(replace(step, step=step.step + done) for step in self.steps))


def pruned_by_masks(keep_masks: Mapping[str, Bool[Tensor, "out in"]]) -> PrunedBlock:
    """The result of a method that decides masks alone, in one go."""
    return PrunedBlock(keep_masks, {name: 1 - mask.float().mean(dim=1) for name, mask in keep_masks.items()})


class Passes(NamedTuple):
    """Samples that pass all blocks of the model: `plain`, without a prediction; `judged`, with the divergence of their
    predictions; `learned`, with its gradient too."""

    plain: int
    judged: int
    learned: int


@runtime_checkable
class Refinement(Protocol):
    """A search over the whole model that begins where the block loop has ended."""

    @property
    def steps(self) -> int:
        """How many it takes."""
        ...

    def bytes_held(self, weights: int, sparsity: float) -> tuple[int, int]:
        """Of all blocks at once, of so many weights: what lies on the device, and what lies where it fits."""
        ...

    def passes(self, samples: int) -> Passes:
        """What the search asks for, of so many calibration samples."""
        ...

    def refine(self, whole: Whole, found: Sequence[Found], on_step: Callable[[ModelStep], None]) -> Sequence[Found]:
        """The masks and weights of all blocks, from those that the block loop found."""
        ...


@dataclass(frozen=True)
class Traits:
    """What the block loop has to know about a pruner or an update before it runs it.

    `statistic`: what to observe about the inputs of each linear; None: nothing. `under_pattern`: in its place where the
    goal is N:M; None: the same. `gradients`: observe the gradient to each weight too. `dense_targets`: targets come
    from dense inputs (else: what the dense block makes of the pruned prefix's outputs). `blocks_together`: how many
    blocks make one task. `quantiser`: what kept weights are rounded with; None: they are not. `reach`: the least and
    the largest sparsity that it can end at. `refinements`: the searches over the whole model that follow. `blind`: it
    reads neither inputs nor targets, so that the probe samples alone pass through the blocks, for the reported loss."""

    statistic: type[Statistic] | None = None
    gradients: bool = False
    dense_targets: bool = False
    blocks_together: int = 1
    quantiser: Quantiser | None = None
    reach: tuple[float, float] = (0.0, 1.0)
    refinements: tuple[Refinement, ...] = ()
    blind: bool = False
    under_pattern: type[Statistic] | None = None

    def observed(self, goal: Goal) -> type[Statistic] | None:
        return self.under_pattern if goal.pattern and self.under_pattern else self.statistic


@runtime_checkable
class Pruner(Protocol):
    """A method knows one block, its inputs, the targets and the statistics; never a model, a data set or a config."""

    @property
    def traits(self) -> Traits:
        """What the block loop has to know. A pruner that holds another one gives that one's, with its own changes."""
        ...

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Problems with this goal, in complete sentences."""
        ...

    def prune_block(self, task: Task) -> PrunedBlock:
        """Decide the block's masks (and weights). Must not change the block."""
        ...
