"""The kept weights of all blocks, tuned together under the model's own loss, their zeros kept.

    minimise over W:  D = mean over tokens of KL(p || q),   q that of the model with W * keep_mask,

p and q the dense and the pruned model's distributions of the next token, on the calibration tokens alone (distillation,
Hinton et al., arXiv 1503.02531). A block's reconstruction loss is a means to this end; where it misleads, this does
not. Adam works on fp32 weights, block by block on the way back through the model, so that one block's gradients are
held at a time; its step is a fraction of the size of a linear's kept weights. The probe samples judge: the result is
never worse on them than where it began.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.reports import ModelStep
from besa_exp.blocks.whole_model import KeepMasks, Weights, Whole, batches
from besa_exp.errors import check_fields, within
from besa_exp.machine import distributed
from besa_exp.methods.descent import Best, adam_on_weights, falling, take_step

logger = logging.getLogger(__name__)

WARM_UP = 5  # steps in which the step size rises to its full value


@dataclass(frozen=True)
class ModelTuning:
    """`lr`: the first step, as a fraction of the root mean square of a linear's kept weights; it falls to 0 along a
    cosine. `checks`: how often the probe samples judge: steps that did not help are undone, and the step size
    shrinks."""

    steps: int = 14
    batch_size: int = 2
    lr: float = 0.001
    checks: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "pruner.model", within(least=1), "steps", "batch_size", "checks")
        check_fields(self, "pruner.model", within(above=0, most=1, note="in units of the weights' size"), "lr")

    def refine(
        self,
        whole: Whole,
        keep_masks: Sequence[KeepMasks],
        weights: Sequence[Weights] | None,
        on_step: Callable[[ModelStep], None],
    ) -> tuple[Sequence[KeepMasks], Sequence[Weights]]:
        """The same masks, and the kept weights in fp32. `weights`: where they begin, the dense ones where None."""
        learn, probe = whole.samples()
        state = _Tuned.of(whole, keep_masks, weights, self.lr)
        best, shrunk = Best(state.optimizers, whole.divergence(probe, state.weights)), 1.0
        every = math.ceil(self.steps / self.checks)
        for number, samples in zip(range(self.steps), batches(learn, self.batch_size, self.seed), strict=False):
            scale = min(1.0, (number + 1) / WARM_UP) * falling(number, self.steps)
            loss = state.step(samples, shrunk * scale)
            on_step(ModelStep(number, loss, best.loss))
            if (number + 1) % every and number + 1 < self.steps:
                continue
            found = whole.divergence(probe, state.weights)
            logger.info("divergence %.4g on the probe after %d steps, %.4g before", found, number + 1, best.loss)
            shrunk *= best.judged(found)
        return keep_masks, state.latent


@dataclass(frozen=True)
class _Tuned:
    """The model's weights on their way: `latent` of each block in fp32, zero where they are not kept."""

    whole: Whole
    keep_masks: Sequence[KeepMasks]
    latent: Sequence[dict[str, Tensor]]
    optimizers: Sequence[torch.optim.Adam]

    @staticmethod
    def of(whole: Whole, keep_masks: Sequence[KeepMasks], weights: Sequence[Weights] | None, lr: float) -> _Tuned:
        latent, optimizers, kept = [], [], []
        for number, block in enumerate(whole.blocks(False)):
            masks = {name: mask.to(block.device) for name, mask in keep_masks[number].items()}
            begun = weights[number] if weights else {name: block.linears[name].weight for name in masks}
            own = {name: begun[name].detach().to(block.device).float() * mask for name, mask in masks.items()}
            latent.append(own)
            kept.append(masks)
            optimizers.append(adam_on_weights(own, masks, lr))
        return _Tuned(whole, kept, latent, optimizers)

    def weights(self, number: int, block: Block) -> dict[str, Tensor]:
        """A block's, in its own dtype."""
        return {name: weight.to(block.linears[name].weight.dtype) for name, weight in self.latent[number].items()}

    def step(self, samples: Tensor, scale: float) -> float:
        """One step of Adam on the samples of these numbers; D before it."""

        def use(number: int, block: Block, inputs: Hidden, upstream: Hidden, multiple: float) -> None:
            leaves = {name: weight.detach().requires_grad_() for name, weight in self.weights(number, block).items()}
            if len(inputs):
                block(inputs, leaves).backward(upstream)
            self._update(number, leaves, multiple, scale)

        return self.whole.differentiate(samples, self.weights, use)

    @torch.no_grad()
    def _update(self, number: int, leaves: Mapping[str, Tensor], multiple: float, scale: float) -> None:
        for name, weight in self.latent[number].items():
            found = leaves[name].grad
            own = torch.zeros_like(weight) if found is None else found.float() / multiple
            weight.grad = distributed.all_sum(own).mul_(self.keep_masks[number][name])
        take_step(self.optimizers[number], scale)
