"""BESA under the model's own loss: the sparsities of the rows of all blocks are learned together.

    minimise   D = mean over tokens of KL(p || q)   subject to   sum over rows of n_r s_r = s sum over rows of n_r,

p and q the dense and the pruned model's distributions of the next token, n_r the weights of row r. BESA (Xu et al.,
arXiv 2402.16880) learns the same sparsities block by block under the error of the block's output; that error shows
neither how much the blocks after it make of it, nor what a block may give up in favour of another. Here the blockwise
result is the start, and a few steps with the gradient of D move weights between rows, linears and blocks. Masks,
gradients and projection are those of `besa`. The probe samples judge as there: the result is never worse on them, in D,
than the blockwise one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.observation import Observed
from besa_exp.blocks.probe import num_probe_samples
from besa_exp.blocks.pruner import Passes
from besa_exp.blocks.reports import ModelStep
from besa_exp.blocks.whole_model import Found, KeepMasks, Whole, batches
from besa_exp.errors import RunError
from besa_exp.machine import distributed
from besa_exp.methods.allocation import Rows, along_budget, project_to_budget
from besa_exp.methods.cuts import Buffers, cut_block
from besa_exp.methods.descent import descend
from besa_exp.rules import Count, Seed, Share, check_fields
from besa_exp.tensors.importance import Importance, ImportanceName, importance_of
from besa_exp.tensors.masks import round_to_total


@dataclass(frozen=True)
class ModelSearch:
    """`lr`: the first step size, in sparsity; `window`: as in `besa`; `checks`: how often the probe samples judge.
    `importance`: as in `besa`, which gives its own."""

    steps: Count = 56
    batch_size: Count = 1
    lr: Share = 0.02
    window: Share = 0.1
    checks: Count = 4
    seed: Seed = 0
    importance: Importance | ImportanceName = "wanda"

    def __post_init__(self) -> None:
        check_fields(self, "pruner.model")

    @staticmethod
    def bytes_held(weights: int, sparsity: float) -> tuple[int, int]:
        """The weights' ranks, in 16 bits."""
        return 2 * weights, 0

    def passes(self, samples: int) -> Passes:
        """Every sample, observed and in its pruned block; the steps; the probe samples at first and at each check."""
        judged = (1 + min(self.checks, self.steps)) * num_probe_samples(samples)
        return Passes(2 * samples, judged, self.steps * self.batch_size)

    def refine(
        self,
        whole: Whole,
        found: Sequence[Found],
        on_step: Callable[[ModelStep], None],
    ) -> list[Found]:
        """Keep masks of as many weights as those of the start. Weights do not move, and must not have."""
        assert not any(one.weights for one in found), "the search over the whole model begins with dense weights"
        rows = ModelRows.of(whole, (one.keep_masks() for one in found), importance_of(self.importance))
        counts = self.learn(rows, on_step)
        return [Found(partial(own.keep_masks, count)) for own, count in zip(rows.rows, counts, strict=True)]

    def learn(self, rows: ModelRows, on_step: Callable[[ModelStep], None]) -> list[dict[str, Tensor]]:
        """The counts of every row [out], by block and linear; they sum to what those at the start sum to. RunError: the
        divergence or its gradient is not finite."""
        learn, probe = rows.whole.samples()
        sparsity = rows.start.clone()

        def gradient(samples: Tensor, number: int, best_loss: float) -> list[Tensor]:
            loss, found = rows.gradient(sparsity, samples, self.window)
            on_step(ModelStep(number, loss, best_loss))
            return [found]

        def project() -> None:
            sparsity.copy_(project_to_budget(sparsity, rows.capacity, rows.total))

        order = batches(learn, self.batch_size, self.seed)
        judge = partial(rows.divergence, sparsity, probe)
        descend([(sparsity, self.lr)], order, self.steps, self.checks, gradient, project, judge)
        return rows.counts(sparsity)


@dataclass(frozen=True)
class ModelRows:
    """The rows of all blocks, in order: `capacity` is the number of weights of each, `start` its sparsity at first, and
    `total` how many weights go. `room`: for the masked weights of a block, shared by blocks of one shape."""

    whole: Whole
    rows: Sequence[Rows]
    room: Sequence[Buffers]
    capacity: Float[Tensor, " row"]
    start: Float[Tensor, " row"]
    total: int

    @staticmethod
    def of(whole: Whole, start: Iterable[KeepMasks], importance: Importance) -> ModelRows:
        """`start`: the keep masks of every block's linears. Weights rank by the importance that is observed behind
        blocks that are pruned so: the ranks that `besa` decided by."""
        states = whole.inputs.clone()
        all_rows, room, shared, counted = [], [], {}, []
        for block, keep_masks in zip(whole.blocks(False), start, strict=True):
            observed, _ = Observed.of(importance, block, states, whole.batch_size)
            weights = block.weights
            rows = Rows.of(weights, partial(observed.score, block), "row")
            counts = {name: (~keep_masks[name]).sum(dim=1).to(block.device) for name in rows.weights}
            room.append(_room(rows.weights, shared))
            block.outputs(states, whole.batch_size, room[-1].fill(rows, counts), out=states)
            shapes = {name: weight.to("meta") for name, weight in weights.items()}  # a streamed block's weights go
            all_rows.append(replace(rows, weights=shapes))
            counted += counts.values()
        capacity, pruned = torch.cat([rows.columns for rows in all_rows]), torch.cat(counted)
        return ModelRows(whole, all_rows, room, capacity, pruned.to(capacity) / capacity, int(pruned.sum()))

    def counts(self, sparsity: Float[Tensor, " row"]) -> list[dict[str, Int[Tensor, " out"]]]:
        """Whole numbers of weights whose sum is exact, by block and linear."""
        parts = round_to_total(self.capacity * sparsity, self.total).split([len(rows.columns) for rows in self.rows])
        return [rows.by_linear(part) for rows, part in zip(self.rows, parts, strict=True)]

    def gradient(
        self, sparsity: Float[Tensor, " row"], samples: Int[Tensor, " sample"], window: float
    ) -> tuple[float, Float[Tensor, " row"]]:
        """D on the samples of these numbers and its gradient along the budget. RunError: one is not finite."""
        counts = self.counts(sparsity)
        by_row: dict[int, Tensor] = {}

        def use(number: int, block: Block, inputs: Hidden, upstream: Hidden, multiple: float) -> None:
            rows = self._present(number, block)
            if len(inputs):
                outputs, cuts = cut_block(block, inputs, rows, counts[number], window, self.room[number])
                *by_count, inputs.grad = torch.autograd.grad(outputs, [*cuts, inputs], upstream, materialize_grads=True)
            else:
                by_count = [torch.zeros_like(rows.columns)]
            by_row[number] = rows.columns * torch.cat(by_count).double() / multiple

        loss = self.whole.differentiate(samples, partial(self._fill, counts), use)
        gradient = distributed.all_sum(torch.cat([by_row[number] for number in range(len(self.rows))]))
        if not gradient.isfinite().all():
            raise RunError(
                "the gradient of the divergence from the dense model is not finite; load the model in float32 or "
                "bfloat16 (model.dtype)."
            )
        return loss, along_budget(gradient, self.capacity)

    def divergence(self, sparsity: Float[Tensor, " row"], samples: Int[Tensor, " sample"]) -> float:
        """D on the samples of these numbers."""
        return self.whole.divergence(samples, partial(self._fill, self.counts(sparsity)))

    def _present(self, number: int, block: Block) -> Rows:
        """A block's rows with the weights that it has while it is out."""
        known = self.rows[number]
        return replace(known, weights={name: block.linears[name].weight.detach() for name in known.weights})

    def _fill(self, counts: Sequence[Mapping[str, Tensor]], number: int, block: Block) -> Mapping[str, Tensor]:
        """The block's masked weights, in its buffers."""
        return self.room[number].fill(self._present(number, block), counts[number])


def _room(weights: Mapping[str, Tensor], shared: dict[tuple[tuple[str, torch.Size], ...], Buffers]) -> Buffers:
    """Room for the weights of a block, the same for all blocks of its shape."""
    shapes = tuple((name, weight.shape) for name, weight in weights.items())
    if shapes not in shared:
        shared[shapes] = Buffers.like(weights)
    return shared[shapes]
