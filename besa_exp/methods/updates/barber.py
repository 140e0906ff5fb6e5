"""LLM-Barber: pruned weights come back for kept ones that matter less to what attention, or the MLP, puts out (Su et
al., arXiv 2408.10631); no weight moves.

With f(W; x) what one part of a block makes of its inputs, and t = f(W_sparse; x) the same as the pruner left it,

    S = mean over samples of (d l / d W)^2 at the dense W,    l = mean over tokens and channels of (f(W; x) - t)^2,
    M = |W| sqrt(S),    W as it will stand: where kept and `retain` the pruner's, else the dense one.

In each group of weights (a row, a column, a linear, all linears of the part) the pruned weights of largest M face the
kept ones of least M; c pairs are worth an exchange, and floor(c ratio) of them are made. A sample is one calibration
sequence, and by definition gradients are squared sample by sample.

Where we differ from the authors' code: pairs are made by rank, stable, where two thresholds are used there, so that a
group keeps its number of zeros whatever the ratio and the ties. An exchange is made only where the error of the
block's output falls on the probe samples, tried for several ratios; the authors have one ratio and never look. Their
way is `ratios=(r,)` and `accept=False`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.observation import mean_squares
from besa_exp.blocks.probe import num_learned, probe_loss
from besa_exp.blocks.pruner import PrunedBlock, Task, Traits
from besa_exp.blocks.units import sub_blocks
from besa_exp.blocks.whole_model import KeepMasks, Weights
from besa_exp.errors import RunError
from besa_exp.machine import distributed
from besa_exp.rules import Share, check_fields, one_of
from besa_exp.tensors import kernels
from besa_exp.tensors.losses import differentiate, gradients
from besa_exp.tensors.masks import floor_of, keep_by_rank, rank_in_group


def squared_gradients(
    outputs_of: Callable[[Hidden, Weights], Hidden],
    dense: Weights,
    sparse: Weights,
    inputs: Hidden,
    product_dtype: torch.dtype = torch.float32,
) -> dict[str, Float[Tensor, "_out _in"]]:
    """S of each linear of `dense`, in fp32. The samples are those that this rank owns."""

    def gradients_of(sample: Hidden, leaves: Weights) -> Sequence[Tensor]:
        with torch.no_grad():
            wanted = outputs_of(sample, sparse).float()
        outputs = outputs_of(sample, leaves)
        _, gradient, scale = differentiate(lambda found: (found - wanted).square().mean(), outputs, product_dtype)
        return [one.float() / scale for one in gradients(outputs, [*leaves.values()], gradient)]

    return mean_squares(dense, inputs, gradients_of)


def barber_metric(
    weight: Float[Tensor, "out in"], squared_gradient: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """M = |W| sqrt(S)."""
    return weight.float().abs() * squared_gradient.sqrt()


def exchanged(
    metrics: Weights, keep_masks: KeepMasks, granularity: str, ratio: float, group: int | None = None
) -> KeepMasks:
    """The keep masks of a part's linears after floor(c ratio) exchanges in each group of weights, whose number of zeros
    stays. `group`: rows keep as many of every `group` consecutive inputs as they did, and `granularity` is row."""
    if group:
        assert granularity == "row", "N:M is kept within rows"
        return {name: _within_groups(metrics[name], mask, ratio, group) for name, mask in keep_masks.items()}
    if granularity == "row":
        return {name: _by_rank(metrics[name], mask, ratio) for name, mask in keep_masks.items()}
    if granularity == "column":
        return {name: _by_rank(metrics[name].T, mask.T, ratio).T.contiguous() for name, mask in keep_masks.items()}
    found = {}
    for names in [[name] for name in keep_masks] if granularity == "linear" else [[*keep_masks]]:
        metric, mask = (torch.cat([own[name].flatten() for name in names])[None] for own in (metrics, keep_masks))
        parts = _by_rank(metric, mask, ratio)[0].split([keep_masks[name].numel() for name in names])
        found |= {name: part.view_as(keep_masks[name]) for name, part in zip(names, parts, strict=True)}
    return found


def _by_rank(
    metric: Float[Tensor, "group weight"], keep_mask: Bool[Tensor, "group weight"], ratio: float
) -> Bool[Tensor, "group weight"]:
    """Row by row: the k largest pruned weights come back, and the k least kept ones go."""
    back, gone, count = _pairs(metric, keep_mask, ratio)
    return (keep_mask | ~keep_by_rank(back, count)) & keep_by_rank(gone, count)


def _pairs(metric: Tensor, keep_mask: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """The place of each weight of a row in the order in which weights come back, in that in which they go, and of how
    many [group]."""
    gain, cost = metric.masked_fill(keep_mask, -torch.inf), metric.masked_fill(~keep_mask, torch.inf)
    back, gone = kernels.rank_in_row(-gain), kernels.rank_in_row(cost)
    falling, rising = (torch.empty_like(of).scatter_(1, at.long(), of) for of, at in ((gain, back), (cost, gone)))
    worth = (falling > rising).sum(dim=1)
    return back, gone, floor_of(worth.double() * ratio)


def _within_groups(metric: Tensor, keep_mask: Tensor, ratio: float, group: int) -> Tensor:
    """The weights that come back are chosen by row, of a group at most as many as it keeps; in each group as many kept
    ones go, those of least metric."""
    back, _, count = _pairs(metric, keep_mask, ratio)
    grown = ~keep_by_rank(back, count)
    kept = keep_mask.unflatten(1, (-1, group)).sum(dim=2, keepdim=True)
    rank = rank_in_group(-metric.masked_fill(~grown, -torch.inf), group).unflatten(1, (-1, group))
    grown = grown & (rank < kept).flatten(1)
    each = grown.unflatten(1, (-1, group)).sum(dim=2, keepdim=True)
    gone = rank_in_group(metric.masked_fill(~keep_mask, torch.inf), group).unflatten(1, (-1, group))
    return (keep_mask & (gone >= each).flatten(1)) | grown


@dataclass(frozen=True)
class Barber:
    """`ratios`: those that are tried, of the pairs that are worth an exchange. `accept`: an exchange is made only where
    the probe samples' loss falls; else the only ratio's is. `granularity`: whom a number of zeros is shared by.
    `retain`: weights that the pruner moved stay as it left them where they stay kept; else all are the dense ones."""

    ratios: tuple[Share, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
    granularity: Annotated[str, one_of("row", "column", "linear", "part")] = "row"
    accept: bool = True
    retain: bool = True

    traits = Traits()

    def __post_init__(self) -> None:
        check_fields(self, "update")
        if not self.ratios:
            raise ValueError("update.ratios=[]: must hold a number; the paper: [0.01]")
        if not self.accept and len(self.ratios) > 1:
            raise ValueError(
                f"update.accept=false with update.ratios={[*self.ratios]}: nothing chooses between several ratios "
                "then; give one, or set update.accept=true"
            )

    def check(self, pattern: str) -> list[str]:
        if pattern == "unstructured" or self.granularity == "row":
            return []
        return [
            f"update.granularity={self.granularity} with pattern={pattern}: exchanges between rows break N:M; set "
            "update.granularity=row"
        ]

    def update_block(self, task: Task, pruned: PrunedBlock) -> PrunedBlock:
        """Attention first, then the MLP under attention's new masks; blocks that have no such parts as a whole."""
        block, inputs, targets = task.block, task.inputs, task.targets
        group = task.goal.pattern[1] if task.goal.pattern else task.goal.group
        state = _State.of(block, pruned, self.retain)
        before = probe_loss(block, inputs, targets, state.weights())
        learned = inputs[: distributed.own_place(num_learned(distributed.total(len(inputs))))]
        loss = before
        for part, names in parts_of(block, inputs):
            metrics = state.metrics(part, names, learned)
            tried = [(ratio, state.exchanged(metrics, names, self.granularity, ratio, group)) for ratio in self.ratios]
            losses = [probe_loss(block, inputs, targets, one.weights()) for _, one in tried]
            best = min(range(len(losses)), key=losses.__getitem__)
            if losses[best] < loss or not self.accept:
                state, loss = tried[best][1], losses[best]
        masks = state.keep_masks
        allocated = {name: 1 - mask.float().mean(dim=1) for name, mask in masks.items()}
        weights = None if pruned.weights is None else state.stand
        return replace(pruned, keep_masks=masks, allocated=allocated, weights=weights, loss_before=before)


def parts_of(block: Block, inputs: Hidden) -> Sequence[tuple[Block, tuple[str, ...]]]:
    """Attention and MLP with the names of their linears; the block whole where they work side by side."""
    try:
        return sub_blocks(block, inputs)
    except RunError:
        return [(block, tuple(block.linears))]


@dataclass(frozen=True)
class _State:
    """Masks, and the weights: `dense`, as the pruner `left` those that it keeps, and as they `stand` before they are
    masked."""

    dense: Weights
    left: Weights
    stand: Weights
    keep_masks: KeepMasks
    permutations: Mapping[str, Tensor]
    product_dtype: torch.dtype

    @staticmethod
    def of(block: Block, pruned: PrunedBlock, retain: bool) -> _State:
        dense, masks = block.weights, pruned.keep_masks
        left = dense
        if pruned.weights is not None:
            given = pruned.weights
            left = {name: torch.where(mask, given[name].to(dense[name]), dense[name]) for name, mask in masks.items()}
        return _State(dense, left, left if retain else dense, masks, pruned.permutations, block.product_dtype)

    def weights(self) -> dict[str, Tensor]:
        """As the block would be written."""
        return {name: self.stand[name] * mask for name, mask in self.keep_masks.items()}

    def metrics(self, part: Block, names: Sequence[str], inputs: Hidden) -> dict[str, Tensor]:
        """M of the linears of a part that has its first masks; the block's others are as they are now."""
        fixed = {name: weight for name, weight in self.weights().items() if name not in names}
        found = squared_gradients(
            lambda hidden, weights: part(hidden, {**fixed, **weights}),
            {name: self.dense[name] for name in names},
            {name: self.left[name] * self.keep_masks[name] for name in names},
            inputs,
            self.product_dtype,
        )
        return {name: barber_metric(self.stand[name], found[name]) for name in names}

    def exchanged(
        self, metrics: Weights, names: Sequence[str], granularity: str, ratio: float, group: int | None
    ) -> _State:
        """After the exchanges in one part. A weight that comes back is the dense one."""
        to, back = self.permutations, {name: order.argsort() for name, order in self.permutations.items()}
        here = slice(None)
        given, masks = (
            {name: own[name][:, to.get(name, here)] for name in names} for own in (metrics, self.keep_masks)
        )
        found = exchanged(given, masks, granularity, ratio, group)
        found = {name: mask[:, back.get(name, here)] for name, mask in found.items()}
        return replace(self, keep_masks={**self.keep_masks, **found})
