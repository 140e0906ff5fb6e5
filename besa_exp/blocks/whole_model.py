"""A model as a search over all of its blocks sees it, under the loss

    D = mean over tokens of KL(p || q),

p and q the dense and the pruned model's distributions of the next token. A gradient of D goes through the blocks twice:
forwards only the states between blocks are kept; backwards each block is computed once more and handed the gradient of
its output. So one block's activations are held at a time, and blocks may be read from files in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from besa_exp.blocks.activations import Allocate
from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.head import Head, divergence
from besa_exp.blocks.probe import num_learned
from besa_exp.errors import RunError
from besa_exp.machine import distributed

Blocks = Callable[[bool], Iterable[Block]]
"""The dense blocks, each with its weights while it is out: in order, or from the last to the first (True)."""
Weights = Mapping[str, Float[Tensor, "_out _in"]]
KeepMasks = Mapping[str, Bool[Tensor, "_out _in"]]
WeightsOf = Callable[[int, Block], Weights]
"""The weights that a block, of this number, has in the pruned model; they hold until the next call."""


@dataclass(frozen=True)
class Found:
    """What became of a block, made when it is asked for: its keep masks and, where kept weights moved, its weights; a
    whole model's would take as much memory as the model."""

    keep_masks: Callable[[], KeepMasks]
    weights: Callable[[], Weights] | None = None


@dataclass(frozen=True)
class Whole:
    """`inputs` are those of the first block and `outputs` those of the dense model's last, of the samples that this
    rank owns; `batch_size` samples pass a block together where nothing is learned. `room` is where so many bytes fit
    that are held of all blocks at once."""

    blocks: Blocks
    inputs: Hidden
    outputs: Hidden
    head: Head
    batch_size: int
    room: Callable[[int], Allocate]

    def samples(self) -> tuple[int, Int[Tensor, " sample"]]:
        """How many samples, the first ones, are learned from, and the numbers of those that judge."""
        num_samples = distributed.total(len(self.inputs))
        learn = num_learned(num_samples)
        return learn, torch.arange(min(learn, num_samples - 1), num_samples)

    @torch.no_grad()
    def divergence(self, samples: Int[Tensor, " sample"], weights_of: WeightsOf) -> float:
        """D on the samples of these numbers."""
        own = distributed.own_places(samples).to(self.inputs.device)
        states = self.inputs[own]
        for number, block in enumerate(self.blocks(False)):
            block.outputs(states, self.batch_size, weights_of(number, block), out=states)
        total = torch.zeros((), dtype=torch.float64)
        for place in range(len(own)):
            expected = self.head(self.outputs[own[place : place + 1]])
            total = total + divergence(expected, self.head(states[place : place + 1])).double().sum()
        return float(distributed.all_sum(total.cpu())) / (len(samples) * self.inputs.shape[1])

    def differentiate(
        self,
        samples: Int[Tensor, " sample"],
        weights_of: WeightsOf,
        use: Callable[[int, Block, Hidden, Hidden, float], None],
    ) -> float:
        """D on the samples of these numbers. From the last block to the first, `use` is given its number, the block,
        its inputs, which take a gradient, a multiple of dD / d(its outputs), and of what; it differentiates the block.
        RunError: D is not finite."""
        own = distributed.own_places(samples).to(self.inputs.device)
        states = [self.inputs[own]]
        with torch.no_grad():
            for number, block in enumerate(self.blocks(False)):
                states.append(block(states[-1], weights_of(number, block)))
        loss, upstream, multiple = self._at_the_end(states.pop(), own, len(samples))
        if not math.isfinite(loss):
            raise RunError(
                f"the divergence from the dense model is {loss}; load the model in float32 or bfloat16 (model.dtype)."
            )
        numbers = range(len(states) - 1, -1, -1)
        for number, block in zip(numbers, self.blocks(True), strict=True):
            inputs = states.pop().requires_grad_()
            use(number, block, inputs, upstream, multiple)
            upstream = inputs.grad if inputs.grad is not None else torch.zeros_like(inputs)
        return loss

    def _at_the_end(self, states: Hidden, own: Tensor, num_samples: int) -> tuple[float, Hidden, float]:
        """D, a multiple of its gradient to the last block's outputs, and of what: in fp16 a logit's part of it,
        (q - p) / tokens, is too small."""
        tokens = num_samples * states.shape[1]
        multiple = 2.0 ** math.floor(math.log2(tokens)) if states.dtype == torch.float16 else 1.0
        states = states.detach().requires_grad_()
        total = states.new_zeros((), dtype=torch.float32)
        for place in range(len(states)):  # the logits of one sample at a time
            with torch.no_grad():
                expected = self.head(self.outputs[own[place : place + 1]])
            part = divergence(expected, self.head(states[place : place + 1])).sum() / tokens
            (part * multiple).backward()
            total += part.detach()
        upstream = states.grad if states.grad is not None else torch.zeros_like(states)
        return float(distributed.all_sum(total)), upstream, multiple


def batches(learn: int, batch_size: int, seed: int) -> Iterator[Int[Tensor, " sample"]]:
    """Numbers of samples, without end: every sample once before any comes again."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(learn, generator=order).split(batch_size)
