"""The kept weights of all blocks, tuned together under the model's own loss, their zeros kept.

    minimise over W:  D = mean over tokens of KL(p || q),   q that of the model with W * keep_mask,

p and q the dense and the pruned model's distributions of the next token, on the calibration tokens alone (distillation,
Hinton et al., arXiv 1503.02531). A block's reconstruction loss is a means to this end; where it misleads, this does
not. Adam works on fp32 weights, block by block on the way back through the model, so that one block's gradients are
held at a time; its step is a fraction of the size of a linear's kept weights. The probe samples judge: the result is
never worse on them than where it began.

Of all blocks at once we hold kept values alone, as vectors in fp32: each value, the best that it was, and Adam's two
moments; a bit a weight says where they belong. Adam works where they lie: on the device, on the host, or in files.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.probe import num_probe_samples
from besa_exp.blocks.pruner import Passes
from besa_exp.blocks.reports import ModelStep
from besa_exp.blocks.whole_model import Found, Whole, batches
from besa_exp.machine import distributed
from besa_exp.machine.memory import give_back_memory
from besa_exp.methods.descent import Best, adam_on_weights, begin_adam, falling, kept_size, take_step
from besa_exp.rules import Count, Seed, Share, check_fields
from besa_exp.tensors.keep_bits import KeepBits

logger = logging.getLogger(__name__)

HELD = 16  # bytes a kept weight: the value, two moments, and the best that it was
WARM_UP = 5  # steps in which the step size rises to its full value


@dataclass(frozen=True)
class ModelTuning:
    """`lr`: the first step, as a fraction of the root mean square of a linear's kept weights; it falls to 0 along a
    cosine. `checks`: how often the probe samples judge: steps that did not help are undone, and the step size
    shrinks."""

    steps: Count = 14
    batch_size: Count = 2
    lr: Share = 0.001
    checks: Count = 4
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "pruner.model")

    @staticmethod
    def bytes_held(weights: int, sparsity: float) -> tuple[int, int]:
        """A bit a weight; values and moments of the kept ones."""
        return weights // 8, HELD * round((1 - sparsity) * weights)

    def passes(self, samples: int) -> Passes:
        """The steps; the probe samples at the start and at each check."""
        return Passes(0, (1 + min(self.checks, self.steps)) * num_probe_samples(samples), self.steps * self.batch_size)

    def refine(
        self,
        whole: Whole,
        found: Sequence[Found],
        on_step: Callable[[ModelStep], None],
    ) -> list[Found]:
        """The same masks, and the kept weights in fp32. They begin where they were found, or as the dense ones."""
        learn, probe = whole.samples()
        state = _Tuned.of(whole, found, self.lr)
        best, shrunk = Best(state.optimizers, whole.divergence(probe, state.weights), state.best), 1.0
        every = math.ceil(self.steps / self.checks)
        for number, samples in zip(range(self.steps), batches(learn, self.batch_size, self.seed), strict=False):
            scale = min(1.0, (number + 1) / WARM_UP) * falling(number, self.steps)
            loss = state.step(samples, shrunk * scale)
            on_step(ModelStep(number, loss, best.loss))
            if (number + 1) % every and number + 1 < self.steps:
                continue
            reached = whole.divergence(probe, state.weights)
            logger.info("divergence %.4g on the probe after %d steps, %.4g before", reached, number + 1, best.loss)
            shrunk *= best.judged(reached)
        tuned = zip(found, state.keep, state.kept, strict=True)  # without the moments
        return [Found(one.keep_masks, partial(_weights, keep, kept)) for one, keep, kept in tuned]


@dataclass(frozen=True)
class _Tuned:
    """The model's weights on their way: which of each block's are kept, and their values in fp32, by linear. `best`:
    room for as many values, in the order of blocks and linears."""

    whole: Whole
    keep: Sequence[Mapping[str, KeepBits]]
    kept: Sequence[Mapping[str, Float[Tensor, " _kept"]]]
    best: Sequence[Float[Tensor, " _kept"]]
    optimizers: Sequence[torch.optim.Adam]

    @staticmethod
    def of(whole: Whole, found: Sequence[Found], lr: float) -> _Tuned:
        keep = [{name: KeepBits.of(mask) for name, mask in one.keep_masks().items()} for one in found]
        allocate = whole.room(HELD * sum(bits.count for own in keep for bits in own.values()))
        kept, best, optimizers = [], [], []
        for number, block in enumerate(whole.blocks(False)):
            keep[number] = {name: bits.to(block.device) for name, bits in keep[number].items()}
            begin = found[number].weights
            begun = begin() if begin else {name: block.linears[name].weight.detach() for name in keep[number]}
            counts = [bits.count for bits in keep[number].values()]
            rooms = [allocate(torch.Size([sum(counts)]), torch.float32).split(counts) for _ in range(HELD // 4)]
            own, first = dict(zip(keep[number], rooms[0], strict=True)), {}
            for name, bits in keep[number].items():
                weight = begun[name].to(block.device).float() * bits.mask()
                first[name] = lr * kept_size(weight, torch.tensor(bits.count))
                own[name].copy_(bits.gather(weight))
            optimizers.append(adam_on_weights(own, first))
            for value, *moments in zip(*rooms[:3], strict=True):
                begin_adam(optimizers[-1], value, *moments)
            kept.append(own)
            best += rooms[3]
            del begun
            give_back_memory()
        return _Tuned(whole, keep, kept, best, optimizers)

    def weights(self, number: int, block: Block) -> dict[str, Tensor]:
        """A block's, in its own dtype."""
        return _weights(self.keep[number], self.kept[number], lambda name: block.linears[name].weight.dtype)

    def step(self, samples: Tensor, scale: float) -> float:
        """One step of Adam on the samples of these numbers; D before it."""

        def use(number: int, block: Block, inputs: Hidden, upstream: Hidden, multiple: float) -> None:
            leaves = {name: weight.requires_grad_() for name, weight in self.weights(number, block).items()}
            if len(inputs):
                block(inputs, leaves).backward(upstream)
            self._update(number, leaves, multiple, scale)

        return self.whole.differentiate(samples, self.weights, use)

    @torch.no_grad()
    def _update(self, number: int, leaves: Mapping[str, Tensor], multiple: float, scale: float) -> None:
        for name, value in self.kept[number].items():
            bits, leaf = self.keep[number][name], leaves[name]
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            leaf.grad = None
            value.grad = distributed.all_sum(bits.gather(gradient).float() / multiple).to(value.device)
        take_step(self.optimizers[number], scale)
        give_back_memory()


def _weights(
    keep: Mapping[str, KeepBits],
    kept: Mapping[str, Float[Tensor, " _kept"]],
    dtype_of: Callable[[str], torch.dtype] = lambda name: torch.float32,
) -> dict[str, Float[Tensor, "_out _in"]]:
    """A block's weights, 0 where they are not kept."""
    weights = {}
    for name, bits in keep.items():
        weights[name] = torch.zeros(bits.shape, dtype=dtype_of(name), device=bits.bits.device)
        bits.scatter_(kept[name].to(weights[name]), weights[name])
    return weights
