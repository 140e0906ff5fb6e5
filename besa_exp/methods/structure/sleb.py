"""SLEB: blocks go one after the other, each the one without which the whole model's loss is least (Song et al., arXiv
2402.09025).

With A blocks alive, each step tries A models, every one of them without one more block. They share the states up to
the block in which they part: one pass over the alive blocks, in order, with the state of the model as it is and one
for each block that was left out before, is A (A - 1) / 2 + (A - 1) block evaluations where A models by themselves cost
A (A - 1). Blocks are read once a step, so that they may be streamed.

The loss is that of the tokens (cross entropy, as the authors have it) or the distance from the dense model's
predictions (KL, which needs no labels and is 0 where nothing is lost). The authors multiply a window's mean cross
entropy by its length, a factor that changes no choice. Where all losses are not a number their code removes the last
block in silence; here that is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.head import summed_divergences, summed_entropies
from besa_exp.checkpoints.structure import Costs, Dimensions, Structure
from besa_exp.errors import RunError
from besa_exp.machine import distributed
from besa_exp.methods.budgets.budget import Work
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.structure.method import DenseModel
from besa_exp.methods.structure.shortgpt import Removed, amount, amount_problems, check_amount, without
from besa_exp.rules import CountOrZero, Fraction, check_fields, one_of

LossOf = Callable[[Sequence[Hidden]], Float[Tensor, " model"]]
"""Of each tried model the last block's outputs of this rank's samples to the sum of their loss."""


@dataclass(frozen=True)
class Removal:
    """One step: the block that went, by original number, and the loss of the model without each one that could, in nats
    a token; `passes`: block evaluations of all samples."""

    block: int
    losses: Mapping[int, float]
    passes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; a loss that is not finite is None there."""
        losses = {str(block): loss if math.isfinite(loss) else None for block, loss in self.losses.items()}
        return {"block": self.block, "losses": losses, "passes": self.passes}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Removal:
        losses = {int(block): math.nan if loss is None else loss for block, loss in values["losses"].items()}
        return Removal(values["block"], losses, values["passes"])


@torch.no_grad()
def losses_without(
    blocks: Iterable[Block],
    inputs: Hidden,
    removed: Sequence[int],
    candidates: Sequence[int],
    batch_size: int,
    loss_of: LossOf,
) -> tuple[dict[int, float], int]:
    """The summed loss of the model without `removed` and each of the `candidates`, and the block evaluations of all
    samples that this took. Holds as many states as there are candidates, and two more."""
    gone, asked = set(removed), sorted(candidates)
    together = inputs  # of the models that have not parted yet
    apart: dict[int, Hidden] = {}
    passes = 0
    for block in blocks:
        if block.index in gone:
            continue
        for candidate, states in apart.items():
            apart[candidate] = block.outputs(states, batch_size)
        passes += len(apart)
        if block.index in asked:
            apart[block.index] = together
        if block.index < asked[-1]:
            together = block.outputs(together, batch_size)
            passes += 1
    found = distributed.all_sum(loss_of([apart[candidate] for candidate in asked]))
    return dict(zip(asked, found.tolist(), strict=True)), passes


@dataclass(frozen=True)
class Sleb:
    """`blocks` are removed; None: as many as come nearest to `ratio` of all parameters. Of the blocks that are alive
    the first `early_barrier` and the last `latter_barrier` cannot go."""

    blocks: Removed | None = None
    ratio: Fraction | None = None
    early_barrier: CountOrZero = 1
    latter_barrier: CountOrZero = 1
    loss: Annotated[str, one_of("kl", "cross_entropy")] = "kl"

    narrows = False
    saved_as = None

    def __post_init__(self) -> None:
        check_fields(self, "structure")
        check_amount(self.blocks, self.ratio)

    def check(self, costs: Costs, dimensions: Dimensions) -> list[str]:
        protected = {"early_barrier": self.early_barrier, "latter_barrier": self.latter_barrier}
        return amount_problems(self.blocks, self.ratio, costs, protected)

    def work(self, costs: Costs, num_samples: int, batch_size: int) -> Work:
        """Of each removal from n blocks, with the last candidate at place l: l passes that all share, each candidate's
        own through the blocks behind it, and its predictions; under `kl` the dense model's too."""
        passes = len(costs.blocks) * (self.loss == "kl")
        predictions = 0
        for gone in range(amount(self.blocks, self.ratio, costs)):
            left = len(costs.blocks) - gone
            places = range(left)[self.early_barrier : left - self.latter_barrier]
            passes += places[-1] + sum(left - 1 - place for place in places)
            predictions += len(places) + (self.loss == "kl")
        return Work(0, num_samples * passes, num_samples * predictions)

    def choose(self, dense: DenseModel, progress: Progress, on_progress: Callable[[str], None]) -> Structure:
        """Each removal is kept before the next is looked for."""
        head, samples, length = dense.head(), dense.num_samples, dense.input_ids.shape[1]
        if self.loss == "kl":
            loss_of, tokens = partial(summed_divergences, head, dense.outputs()), samples * length
        else:
            loss_of, tokens = partial(summed_entropies, head, dense.input_ids), samples * (length - 1)
        removals = [Removal.from_dict(values) for values in progress.read().get("removals", [])]
        if removals:
            on_progress(f"going on after {len(removals)} removals")
        count, done = amount(self.blocks, self.ratio, dense.costs), tuple(removals)
        for removal in self.search(dense.blocks, dense.inputs(), dense.costs, dense.batch_size, loss_of, tokens, done):
            removals.append(removal)
            progress.write({"removals": [one.to_dict() for one in removals]})
            on_progress(
                f"{len(removals)} of {count}: block index {removal.block}, {self.loss} "
                f"{removal.losses[removal.block]:.4g}"
            )
        return without([removal.block for removal in removals], len(dense.costs.blocks))

    def candidates(self, num_blocks: int, removed: Sequence[int]) -> list[int]:
        alive = [block for block in range(num_blocks) if block not in removed]
        return alive[self.early_barrier : len(alive) - self.latter_barrier]

    def search(
        self,
        blocks: Callable[[], Iterable[Block]],
        inputs: Hidden,
        costs: Costs,
        batch_size: int,
        loss_of: LossOf,
        tokens: int,
        done: Sequence[Removal] = (),
    ) -> Iterator[Removal]:
        """The removals that are left after those that are `done`, each as soon as it is found. `blocks` gives the dense
        blocks, as often as it is called, each with its weights while it is out; `inputs` are those of the first and are
        kept; losses are returned divided by `tokens`, of all ranks. RunError: no model has a finite loss."""
        removed = [removal.block for removal in done]
        while len(removed) < amount(self.blocks, self.ratio, costs):
            candidates = self.candidates(len(costs.blocks), removed)
            summed, passes = losses_without(blocks(), inputs, removed, candidates, batch_size, loss_of)
            losses = {block: total / tokens for block, total in summed.items()}
            finite = {block: loss for block, loss in losses.items() if math.isfinite(loss)}
            if not finite:
                raise RunError(
                    f"structure=sleb: without any of the blocks {candidates} the loss is not finite, after the removal "
                    f"of {removed}; load the model in float32 or bfloat16 (model.dtype)"
                )
            removal = Removal(min(finite, key=finite.__getitem__), losses, passes)  # of equals the earliest
            removed.append(removal.block)
            yield removal
