"""Reconstruction: the kept weights of a block are tuned until the sparse block gives the targets again.

    minimise over W:  sum_t ||Y_t - Yhat_t||^2 / ||Y_t||  /  sum_t ||Y_t||,   Yhat = block(X; W * keep_mask),

with X what the pruned prefix gives, Y the targets, t the tokens of a window: the reconstruction loss (BESA, arXiv
2402.16880, Eq. 1), each token's part times its size. A massive activation (Sun et al., arXiv 2402.17762) is one token
of hundreds, which nearly all others attend to. Where all tokens count alike, steps that are large enough for the others
can make it vanish, and no later block can mend that (`experiments/real_model`).

Block-wise tuning of the kept weights is known from EBFT (Guo et al., arXiv 2402.12419). Here Adam works on fp32 copies,
its step is a fraction of the weights' own size, and samples that are not learned from (the probe) choose that fraction,
by trying, and between the states.

On request the block's norms are tuned along with the weights, under the same loss, and chosen together with them.

The mask may still be closing while the weights are tuned (`Ramp`). The weights that go next are those of the whole
block with the least W^2 E[(dL/dW)^2]: what their removal costs to second order, with the squared gradient for the
curvature (optimal brain damage, LeCun et al., 1990). It compares weights of all rows and linears in one unit, that of
the block's loss, so that the sparsity of every row is learned along with the weights, and the budget is met exactly.
The mean square of the gradient is Adam's own second moment: it costs nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden, samples_at
from besa_exp.blocks.course import Course
from besa_exp.blocks.linears import find_norms, room_like
from besa_exp.blocks.probe import num_learned, probe_loss
from besa_exp.blocks.pruner import PrunedBlock, pruned_by_masks
from besa_exp.blocks.reports import Step
from besa_exp.blocks.whole_model import KeepMasks, Weights, batches
from besa_exp.machine import distributed
from besa_exp.methods.descent import Best, adam_on_weights, falling, kept_size, take_step
from besa_exp.rules import Count, Seed, Share, check_fields
from besa_exp.tensors.losses import differentiate, gradients, weighted_loss
from besa_exp.tensors.masks import keep_largest

logger = logging.getLogger(__name__)
NORM_STEP = 0.1  # of a norm's first step size to that of weights: it holds few values, which all tokens share
WARM_UP = 10  # steps in which the step size rises to its full value
STEP_SIZES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
FIRST_TRIED = 0.01  # of these
TRIED = 2  # steps with each that is tried
LONGER = 3  # times the size that is best in a few steps is best in many (experiments/real_model)


@dataclass(frozen=True)
class Tuning:
    """`lr`: the first step, as a fraction of the root mean square of a linear's kept weights; it falls to 0 along a
    cosine, and shrinks where it does not help. None: LONGER times the one of STEP_SIZES whose first steps lower the
    probe's loss most. `checks`: how often the probe samples judge once the mask is fixed. `norms`: whether they are
    tuned too."""

    epochs: Count = 4
    batch_size: Count = 4
    lr: Share | None = None
    checks: Count = 4
    seed: Seed = 0
    norms: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "tuning")

    def num_steps(self, learn: int) -> int:
        """Steps over `learn` samples."""
        return self.epochs * math.ceil(learn / self.batch_size)

    def scale(self, step: int, num_steps: int) -> float:
        """The step size at `step`, as a fraction of `lr`."""
        return min(1.0, (step + 1) / WARM_UP) * falling(step, num_steps)

    def judged(self, num_steps: int, ramp: Ramp | None) -> set[int]:
        """The steps after which the probe judges, the last among them; none before a `ramp` has settled."""
        settles = ramp.settles(num_steps) if ramp else 0
        steps = (num_steps - 1 - (num_steps - settles) * number // self.checks for number in range(self.checks))
        return {step for step in steps if step >= settles}


@dataclass(frozen=True)
class Ramp:
    """A block's sparsity on its way from `first` to `last`, cubic in time (Zhu and Gupta, arXiv 1710.01878) over the
    share `until` of the steps; the mask changes every `every` steps."""

    first: float
    last: float
    until: float = 0.6
    every: int = 4

    def settles(self, num_steps: int) -> int:
        """The step after which the mask is fixed."""
        return int(self.until * (num_steps - 1))

    def sparsity_after(self, step: int, num_steps: int) -> float | None:
        """The sparsity the mask changes to after `step`; None: it does not change then."""
        settles = self.settles(num_steps)
        if step > settles or (step % self.every and step != settles):
            return None
        left = 1 - step / settles if settles else 0.0
        return self.last + (self.first - self.last) * left**3


def keep_valuable(
    weights: Weights, squared_gradients: Weights, keep_masks: KeepMasks, sparsity: float
) -> dict[str, Tensor]:
    """Keep masks under which exactly round(sparsity * weights) weights of the whole block go, the least
    W^2 E[(dL/dW)^2] first. What was pruned before stays so."""
    sizes = [weight.numel() for weight in weights.values()]
    costs = next(iter(weights.values())).new_empty(sum(sizes))  # as large as the block: no second copy of it
    for cost, (name, weight) in zip(costs.split(sizes), weights.items(), strict=True):
        torch.mul(weight.square(), squared_gradients[name], out=cost.view_as(weight))
        cost.masked_fill_(~keep_masks[name].flatten(), -1)
    kept = keep_largest(costs[None], round(sparsity * len(costs)))[0].split(sizes)
    return {name: mask.view_as(weights[name]) for name, mask in zip(weights, kept, strict=True)}


def tune(
    block: Block,
    inputs: Hidden,
    targets: Hidden,
    weights: Weights,
    keep_masks: KeepMasks,
    tuning: Tuning,
    on_step: Callable[[Step], None],
    ramp: Ramp | None = None,
) -> PrunedBlock:
    """Tune `weights` under `keep_masks`, which a `ramp` closes further on the way. What is returned is in the block's
    dtype, with zeros where it is not kept.

    What is tuned between two looks at the probe must lower its loss: else it is undone, and the step size shrinks. So
    the result is never worse on the probe than what it began with, or with a ramp than the mask just closed. RunError:
    a loss is not finite."""
    learn = num_learned(distributed.total(len(inputs)))
    num_steps = tuning.num_steps(learn)
    judged = tuning.judged(num_steps, ramp)
    begin = partial(_State.of, block, inputs, targets, weights, keep_masks, tuning.norms)
    order = [*islice(batches(learn, tuning.batch_size, tuning.seed), num_steps)]
    course = Course(block, on_step)
    first = begin(0.0).gradients(order[0], course)  # of the weights as they come: step sizes are tried with it too
    lr = tuning.lr or _first_step_size(begin, first, order[1:TRIED])
    state, shrunk = begin(lr), 1.0
    best = Best([state.optimizer], state.probe_loss())
    before = probe_loss(block, inputs, targets, state.masked)
    for number, samples in enumerate(order):
        found = state.gradients(samples, course) if number else first
        state.step(found, shrunk * tuning.scale(number, num_steps))
        sparsity = ramp.sparsity_after(number, num_steps) if ramp else None
        if sparsity is None and number not in judged:
            continue
        course.wait()
        shrunk *= best.judged(state.probe_loss())
        if sparsity is not None:
            state.prune_to(sparsity)
            best.now(state.probe_loss())
    logger.info("%s: a first step size of %g, %.2g at the end", block.name, lr, lr * shrunk)
    tuned = state.tuned()
    weights, norms = ({name: tuned[name] for name in names} for names in (state.latent, state.norms))
    course.wait()
    masked = pruned_by_masks(state.keep_masks)
    return replace(masked, weights=weights, norms=norms, loss_before=before, steps=tuple(course.steps))


def _first_step_size(
    begin: Callable[[float], _State], first: Mapping[str, Tensor], later: Sequence[Int[Tensor, " sample"]]
) -> float:
    """`first`: the gradients of the first step; `later`: the samples of further ones."""

    def loss_after(lr: float) -> float:
        state = begin(lr)
        course = Course(state.block)
        state.step(first, 1.0)
        for samples in later:
            state.step(state.gradients(samples, course), 1.0)
        course.wait()
        return state.probe_loss()

    return min(1.0, LONGER * downhill(STEP_SIZES, FIRST_TRIED, loss_after))


def downhill(sizes: Sequence[float], start: float, loss_after: Callable[[float], float]) -> float:
    """The size of least loss, if losses along `sizes` fall and then rise: from `start`, one of them, to the next and on
    while it gets better, else to the one before and on. `loss_after` is asked once for each that is tried."""
    begun = sizes.index(start)
    losses = {begun: loss_after(start)}
    for direction in (1, -1):
        best = begun
        while 0 <= best + direction < len(sizes):
            losses[best + direction] = loss_after(sizes[best + direction])
            if losses[best + direction] >= losses[best]:
                break
            best += direction
        if best != begun:
            return sizes[best]
    return start


@dataclass
class _State:
    """A block's weights on their way: `latent` in fp32, what is `kept` of them, its `norms` in fp32 where they are
    tuned, and `masked`, leaves in the block's dtype that every step fills with the kept weights and the norms."""

    block: Block
    inputs: Hidden
    targets: Hidden
    latent: dict[str, Tensor]
    norms: dict[str, Tensor]
    keep_masks: dict[str, Tensor]
    masked: dict[str, Tensor]
    optimizer: torch.optim.Adam
    sparsity: float

    @staticmethod
    def of(
        block: Block,
        inputs: Hidden,
        targets: Hidden,
        weights: Weights,
        keep_masks: KeepMasks,
        with_norms: bool,
        lr: float,
    ) -> _State:
        latent = {name: weight.detach().float() * keep_masks[name] for name, weight in weights.items()}
        masked = room_like({name: block.linears[name].weight.detach() for name in latent})
        masked = {name: room.requires_grad_() for name, room in masked.items()}
        groups, norms = [], {}
        for parameters in find_norms(block.module) if with_norms else ():
            own = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}
            size = max(float(value.square().mean().sqrt()) for value in own.values())
            groups.append({"params": [*own.values()], "first_lr": NORM_STEP * lr * size})
            masked |= {name: torch.empty_like(parameter).requires_grad_() for name, parameter in parameters.items()}
            norms |= own
        first = {name: lr * kept_size(weight, keep_masks[name].sum()) for name, weight in latent.items()}
        optimizer = adam_on_weights(latent, first, groups)
        masks, sparsity = dict(keep_masks), _sparsity_of(keep_masks)
        return _State(block, inputs, targets, latent, norms, masks, masked, optimizer, sparsity)

    def gradients(self, samples: Int[Tensor, " sample"], course: Course) -> dict[str, Tensor]:
        """To the weights, where they are kept, and the norms, of the samples of these numbers, of which this rank may
        have none."""
        own = distributed.own_places(samples)
        inputs, targets = samples_at(self.inputs, own), samples_at(self.targets, own)
        self._fill()
        outputs = self.block(inputs, self.masked)
        loss, upstream, multiple = differentiate(
            lambda reached: weighted_loss(reached, targets), outputs, self.block.product_dtype
        )
        course.add(loss, self.sparsity)
        summed = {}
        for name, found in zip(self.masked, gradients(outputs, [*self.masked.values()], upstream), strict=True):
            summed[name] = distributed.all_sum(found.float() / multiple)
            if name in self.latent:
                summed[name].mul_(self.keep_masks[name])
        return summed

    def step(self, found: Mapping[str, Tensor], scale: float) -> None:
        """One step of Adam with these gradients."""
        for name, value in (self.latent | self.norms).items():
            value.grad = found[name]
        take_step(self.optimizer, scale)

    @torch.no_grad()
    def prune_to(self, sparsity: float) -> None:
        """Close the mask, and drop what it closes on."""
        squared = {name: self.optimizer.state[weight]["exp_avg_sq"] for name, weight in self.latent.items()}
        self.keep_masks = keep_valuable(self.latent, squared, self.keep_masks, sparsity)
        self.sparsity = _sparsity_of(self.keep_masks)
        for name, weight in self.latent.items():
            weight.mul_(self.keep_masks[name])

    def probe_loss(self) -> float:
        """The loss of the samples that are not learned from."""
        self._fill()
        return probe_loss(self.block, self.inputs, self.targets, self.masked, weighted_loss)

    def tuned(self) -> dict[str, Tensor]:
        """A copy of the kept weights and the norms in the block's dtype."""
        self._fill()
        return {name: masked.detach().clone() for name, masked in self.masked.items()}

    @torch.no_grad()
    def _fill(self) -> None:
        for name, masked in self.masked.items():
            masked.copy_(self.norms[name] if name in self.norms else self.latent[name] * self.keep_masks[name])


def _sparsity_of(keep_masks: KeepMasks) -> float:
    kept = sum(int(mask.sum()) for mask in keep_masks.values())
    return 1 - kept / sum(mask.numel() for mask in keep_masks.values())
