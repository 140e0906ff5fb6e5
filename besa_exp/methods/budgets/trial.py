"""Whole models tried: how far the model's predictions move when each block is pruned to a sparsity of its own.

    D = mean over tokens of KL(p || q),    p and q the dense and the tried model's distributions of the next token.

A tried model is pruned the same in every row of a block, by an importance that was observed on the dense model (Wanda's
by default). Its weights are made again block by block: no database of pruned weights is kept, and a budget needs to
know no pruner. All models are tried in one pass
over the blocks; those that begin with the same sparsities share the states until they part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.head import Head, summed_divergences
from besa_exp.blocks.observation import Observed
from besa_exp.errors import RunError
from besa_exp.machine import distributed
from besa_exp.methods.budgets.budget import Budget, exact_goals, pruned_to, survey
from besa_exp.methods.budgets.progress import Progress
from besa_exp.tensors.importance import Importance, ImportanceName, importance_of

Sparsities = tuple[float, ...]  # of a tried model's blocks, in order


@runtime_checkable
class DepthSearch(Protocol):
    """A budget that tries whole models."""

    @property
    def importance(self) -> Importance | ImportanceName:
        """What the tried models are pruned by."""
        ...

    def search(self, trial: Trial, sparsity: float, progress: Progress) -> Float[Tensor, " block"]:
        """The sparsity of each block in order, as `Budget.sparsities` gives them. Goes on from `progress`."""
        ...


def check_budget(budget: object, pattern: str) -> list[str]:
    """The problem of a budget beside a pattern, which leaves nothing to deal out."""
    if pattern == "unstructured" or not isinstance(budget, Budget | DepthSearch):
        return []
    return [
        f"budget={type(budget).__name__.lower()} with pattern={pattern}: a budget over depth is for "
        "pattern=unstructured; leave one of them out"
    ]


@dataclass(frozen=True)
class Trial:
    """Tries models. `blocks` gives the dense blocks, as often as it is called, each with its weights while it is out;
    `inputs` are those of the first block and `outputs` those of the last, of the samples that this rank owns."""

    blocks: Callable[[], Iterable[Block]]
    inputs: Hidden
    outputs: Hidden
    head: Head
    batch_size: int
    observed: Sequence[Observed]
    sizes: Sequence[int]

    @staticmethod
    def begin(
        blocks: Callable[[], Iterable[Block]],
        inputs: Hidden,
        outputs: Hidden,
        head: Head,
        batch_size: int,
        importance: Importance | ImportanceName = "wanda",
    ) -> Trial:
        """One pass of the dense model. `outputs`, to begin with the same as `inputs`, are overwritten."""
        by = importance_of(importance)
        seen = survey(blocks(), outputs, by, batch_size, lambda block, observed: (observed, block.num_weights))
        observed, sizes = zip(*seen, strict=True)
        return Trial(blocks, inputs, outputs, head, batch_size, observed, sizes)

    @property
    def num_samples(self) -> int:
        """Of all ranks."""
        return distributed.total(len(self.inputs))

    def exact(self, wanted: Float[Tensor, " block"], sparsity: float) -> Sparsities:
        """The sparsities after clipping and rounding to whole numbers of weights."""
        return tuple(goal.sparsity for goal in exact_goals(wanted, self.sizes, sparsity))

    @torch.no_grad()
    def divergences(self, models: Sequence[Sparsities], samples: Int[Tensor, " sample"]) -> list[float]:
        """D of each model on the `samples` of these numbers. RunError: not finite."""
        own = distributed.own_places(samples)
        states: Mapping[Sparsities, Hidden] = {(): self.inputs[own]}
        for depth, block in enumerate(self.blocks()):
            states = self._next(block, self.observed[depth], states, [model[: depth + 1] for model in models])
        distinct = {model: states[model] for model in models}
        tokens = len(samples) * self.inputs.shape[1]
        summed = distributed.all_sum(summed_divergences(self.head, self.outputs[own], [*distinct.values()])) / tokens
        if not summed.isfinite().all():
            raise RunError(
                "the logits of the dense model or of a tried one are not finite; load the model in float32 or bfloat16 "
                "(model.dtype) or check its weights."
            )
        found = dict(zip(distinct, summed.tolist(), strict=True))
        return [found[model] for model in models]

    def _next(
        self,
        block: Block,
        observed: Observed,
        states: Mapping[Sparsities, Hidden],
        beginnings: Sequence[Sparsities],
    ) -> dict[Sparsities, Hidden]:
        """The states after the block, of models that begin like these."""
        reached = {}
        sparsities = sorted({beginning[-1] for beginning in beginnings})
        for sparsity, weights in zip(sparsities, pruned_to(block, observed, sparsities), strict=True):
            for beginning in {one for one in beginnings if one[-1] == sparsity}:
                reached[beginning] = block.outputs(states[beginning[:-1]], self.batch_size, weights)
        return reached
