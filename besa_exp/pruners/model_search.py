"""BESA under the model's own loss: the sparsities of the rows of all blocks are learned together.

    minimise   D = mean over tokens of KL(p || q)   subject to   sum over rows of n_r s_r = s sum over rows of n_r,

p and q the dense and the pruned model's distributions of the next token, n_r the weights of row r. BESA (Xu et al.,
arXiv 2402.16880) learns the same sparsities block by block under the error of the block's output; that error says
neither how much the blocks after it make of it, nor what a block may give up in favour of another. Here the blockwise
result is the start, and a few steps with the gradient of D move weights between rows, linears and blocks. Masks,
gradients and projection are those of `besa`.

A step goes through the blocks twice. Forwards only the states between blocks are kept; backwards each block is computed
once more and handed the gradient of its output. So one block's activations are held at a time, and blocks may be read
from files in both directions. The probe samples judge as in `besa`: the result is never worse on them, in D, than the
blockwise one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from besa_exp import distributed
from besa_exp.blocks import Block, Hidden
from besa_exp.errors import RunError
from besa_exp.head import Head, divergence
from besa_exp.importance import wanda_importance
from besa_exp.losses import token_loss
from besa_exp.masks import Target, keep_by_rank, round_to_total
from besa_exp.observation import observe
from besa_exp.pruners.allocation import Rows, project_to_budget
from besa_exp.pruners.search import Search
from besa_exp.pruning import PrunedBlock, num_probe_samples, pruned_by_masks
from besa_exp.reports import BlockReport, ModelStep, Step
from besa_exp.statistics import InputNorm

Blocks = Callable[[bool], Iterable[Block]]
"""The dense blocks, each with its weights while it is out: in order, or from the last to the first (True)."""


@dataclass(frozen=True)
class Whole:
    """A dense model as a search sees it: its blocks, the inputs of the first and the outputs of the last, of the
    samples that this rank owns, and its head."""

    blocks: Blocks
    inputs: Hidden
    outputs: Hidden
    head: Head
    batch_size: int


@dataclass(frozen=True)
class ModelSearch:
    """`lr`: the first step size, in sparsity; `window`: as in `besa`; `checks`: how often the probe samples judge."""

    steps: int = 56
    batch_size: int = 1
    lr: float = 0.02
    window: float = 0.1
    checks: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "checks"):
            if getattr(self, field) < 1:
                raise ValueError(f"pruner.model.{field}={getattr(self, field)}: must be at least 1")
        for field in ("lr", "window"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(f"pruner.model.{field}={getattr(self, field)}: must be above 0 and at most 1")

    def learn(self, rows: ModelRows, on_step: Callable[[ModelStep], None]) -> list[dict[str, Tensor]]:
        """The counts of every row [out], by block and linear; they sum to what those at the start sum to. RunError: the
        divergence or its gradient is not finite."""
        num_samples = distributed.total(len(rows.whole.inputs))
        learn = max(1, num_samples - num_probe_samples(num_samples))
        probe = torch.arange(min(learn, num_samples - 1), num_samples)
        sparsity = rows.start.clone()
        best, best_loss = sparsity.clone(), rows.divergence(sparsity, probe)
        optimizer = torch.optim.Adam([sparsity], betas=(0.8, 0.99), eps=1e-30)
        scale, every = self.lr, math.ceil(self.steps / self.checks)
        for number, samples in zip(range(self.steps), _batches(learn, self.batch_size, self.seed), strict=False):
            loss, sparsity.grad = rows.gradient(sparsity, samples, self.window)
            on_step(ModelStep(number, loss, best_loss))
            optimizer.param_groups[0]["lr"] = scale * (1 + math.cos(math.pi * number / self.steps)) / 2
            optimizer.step()
            sparsity.copy_(project_to_budget(sparsity, rows.capacity, rows.total))
            if (number + 1) % every and number + 1 < self.steps:
                continue
            found = rows.divergence(sparsity, probe)
            if found < best_loss:
                best, best_loss = sparsity.clone(), found
            else:
                sparsity.copy_(best)
                scale *= 0.4
                optimizer.state[sparsity]["exp_avg"].zero_()
        return rows.counts(best)


def _batches(learn: int, batch_size: int, seed: int) -> Iterator[Int[Tensor, " sample"]]:
    """Numbers of samples, without end: every sample once before any comes again."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(learn, generator=order).split(batch_size)


@dataclass(frozen=True)
class ModelRows:
    """The rows of all blocks, in order: `capacity` is the number of weights of each, `start` its sparsity at first, and
    `total` how many weights go. `buffers`: for the masked weights of a block, shared by blocks of one shape."""

    whole: Whole
    rows: Sequence[Rows]
    buffers: Sequence[Mapping[str, Tensor]]
    capacity: Float[Tensor, " row"]
    start: Float[Tensor, " row"]
    total: int

    @staticmethod
    def of(whole: Whole, start: Sequence[Mapping[str, Int[Tensor, " _out"]]]) -> ModelRows:
        """`start`: the counts of every block's linears. Weights rank by Wanda's importance with the input norms behind
        blocks that are pruned so: the ranks that `besa` decided by."""
        states = whole.inputs.clone()
        rows, buffers, shared = [], [], {}
        for block, counts in zip(whole.blocks(False), start, strict=True):
            statistics, _ = observe(block, states, InputNorm, whole.batch_size)
            own = _rows_of(block, statistics)
            masked = _buffers(own.weights, shared)
            with torch.no_grad():
                own.masked_into(masked, counts)
            block.outputs(states, whole.batch_size, masked, out=states)
            rows.append(_without_weights(own))
            buffers.append(masked)
        capacity = torch.cat([own.columns for own in rows])
        counted = torch.cat([counts[name] for own, counts in zip(rows, start, strict=True) for name in own.weights])
        return ModelRows(whole, rows, buffers, capacity, counted.to(capacity) / capacity, int(counted.sum()))

    def counts(self, sparsity: Float[Tensor, " row"]) -> list[dict[str, Int[Tensor, " out"]]]:
        """Whole numbers of weights whose sum is exact, by block and linear."""
        parts = round_to_total(self.capacity * sparsity, self.total).split([len(own.columns) for own in self.rows])
        return [
            dict(zip(own.weights, part.split([len(weight) for weight in own.weights.values()]), strict=True))
            for own, part in zip(self.rows, parts, strict=True)
        ]

    def gradient(
        self, sparsity: Float[Tensor, " row"], samples: Int[Tensor, " sample"], window: float
    ) -> tuple[float, Float[Tensor, " row"]]:
        """D on the samples of these numbers and its gradient along the budget."""
        counts = self.counts(sparsity)
        own = distributed.own_places(samples).to(self.whole.inputs.device)
        states = [self.whole.inputs[own]]
        with torch.no_grad():
            for number, block in enumerate(self.whole.blocks(False)):
                states.append(block(states[-1], self._fill(number, block, counts[number])))
        loss, upstream, scale = self._at_the_end(states.pop(), own, len(samples))
        by_row: list[Tensor] = [torch.empty(0)] * len(self.rows)
        last = len(self.rows) - 1
        for number, block in zip(range(last, -1, -1), self.whole.blocks(True), strict=True):
            inputs = states.pop().requires_grad_()
            search = Search(
                block, self._present(number, block), 0, self.capacity, self.buffers[number], None, token_loss
            )
            self._fill(number, block, counts[number])

            def upstream_of(outputs: Hidden, upstream: Hidden = upstream) -> tuple[Tensor, Hidden, Tensor]:
                return outputs.new_zeros(()), upstream, outputs.new_ones(())

            _, by_row[number], _ = search.by_row(inputs, search.rows, counts[number], window, upstream_of)
            upstream = inputs.grad if len(own) else inputs.detach()
        gradient = distributed.all_sum(torch.cat(by_row)) / scale
        if not (math.isfinite(loss) and gradient.isfinite().all()):
            raise RunError(
                f"the divergence from the dense model is {loss}, or its gradient is not finite; load the model in "
                "float32 or bfloat16 (model.dtype)."
            )
        return loss, gradient - self.capacity * (gradient.sum() / self.capacity.sum())

    def _at_the_end(self, states: Hidden, own: Tensor, num_samples: int) -> tuple[float, Hidden, float]:
        """D, and the gradient of scale * D to the last block's outputs. A logit's part of it is (q - p) / tokens."""
        tokens = num_samples * states.shape[1]
        scale = 2.0 ** math.floor(math.log2(tokens)) if states.dtype == torch.float16 else 1.0
        states = states.detach().requires_grad_()
        total = states.new_zeros((), dtype=torch.float32)
        for place in range(len(states)):  # the logits of one sample at a time
            with torch.no_grad():
                expected = self.whole.head(self.whole.outputs[own[place : place + 1]])
            part = divergence(expected, self.whole.head(states[place : place + 1])).sum() / tokens
            (part * scale).backward()
            total += part.detach()
        upstream = states.grad if states.grad is not None else torch.zeros_like(states)
        return float(distributed.all_sum(total)), upstream, scale

    @torch.no_grad()
    def divergence(self, sparsity: Float[Tensor, " row"], samples: Int[Tensor, " sample"]) -> float:
        """D on the samples of these numbers."""
        counts = self.counts(sparsity)
        own = distributed.own_places(samples).to(self.whole.inputs.device)
        states = self.whole.inputs[own]
        for number, block in enumerate(self.whole.blocks(False)):
            block.outputs(states, self.whole.batch_size, self._fill(number, block, counts[number]), out=states)
        total = torch.zeros((), dtype=torch.float64)
        for place in range(len(own)):
            expected = self.whole.head(self.whole.outputs[own[place : place + 1]])
            total += divergence(expected, self.whole.head(states[place : place + 1])).double().sum().cpu()
        return float(distributed.all_sum(total)) / (len(samples) * self.whole.inputs.shape[1])

    def keep_masks(self, number: int, counts: Mapping[str, Int[Tensor, " _out"]]) -> dict[str, Tensor]:
        """Those of a block."""
        return {name: keep_by_rank(rank, counts[name]) for name, rank in self.rows[number].ranks.items()}

    def _present(self, number: int, block: Block) -> Rows:
        """A block's rows with the weights that it has while it is out."""
        known = self.rows[number]
        return replace(known, weights={name: block.linears[name].weight.detach() for name in known.weights})

    @torch.no_grad()
    def _fill(self, number: int, block: Block, counts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The block's masked weights, in its buffers."""
        self._present(number, block).masked_into(self.buffers[number], counts)
        return self.buffers[number]


@dataclass(frozen=True)
class Decided:
    """A pruner whose masks were decided before, for all blocks together. `before`: the report of each block by the
    search that came first, whose course is told."""

    rows: ModelRows
    counts: Sequence[Mapping[str, Int[Tensor, " _out"]]]
    before: Sequence[BlockReport]

    statistic = None
    dense_targets = False

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Nothing is left to decide."""
        return []

    def prune_block(
        self,
        block: Block,
        inputs: Hidden,
        targets: Hidden,
        statistics: Mapping[str, Any],
        target: Target,
        on_step: Callable[[Step], None],
    ) -> PrunedBlock:
        """The masks of this block."""
        before = self.before[block.index]
        pruned = pruned_by_masks(self.rows.keep_masks(block.index, self.counts[block.index]))
        return replace(pruned, loss_before=before.loss_before, steps=before.steps)


def _rows_of(block: Block, statistics: Mapping[str, InputNorm]) -> Rows:
    weights = {name: linear.weight.detach() for name, linear in block.linears.items()}
    return Rows.of(weights, lambda name: wanda_importance(weights[name], statistics[name].squared_norm), "row")


def _without_weights(rows: Rows) -> Rows:
    """Their shapes alone: a streamed block's weights go when it does."""
    return replace(rows, weights={name: weight.to("meta") for name, weight in rows.weights.items()})


def _buffers(weights: Mapping[str, Tensor], shared: dict[tuple[str, torch.Size], Tensor]) -> dict[str, Tensor]:
    """Buffers for the weights of a block, the same for all blocks of its shape."""
    for name, weight in weights.items():
        if (name, weight.shape) not in shared:
            shared[name, weight.shape] = torch.empty_like(weight).requires_grad_()
    return {name: shared[name, weight.shape] for name, weight in weights.items()}
