"""What a block costs: one is really pruned, on a few samples of noise.

The model is built without weights; its largest block (or two, where two are pruned together) and what is outside the
blocks get random ones. The block loop itself (`pruning.prune_blocks`) then prunes them with the run's own pruner, so
that a pruner has nothing to say about its costs, and none is forgotten. The passes of a budget over depth may grow with
the square of the blocks: it tells their number, and what it does besides is measured. A block's seconds are taken as

    seconds(samples) = fixed + samples * per_sample,    per_sample(length) = rest + length * per_token

with `fixed` (ranks, factors, column loops) and `per_sample` from two numbers of samples; where the device is too slow
for the run's own sequence length, `rest` and `per_token` from two shorter ones (attention grows faster than linearly: a
few percent at 2,048 tokens, left out). The numbers of samples are such that BESA's search judges equally often in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from besa_exp.blocks.activations import Allocate
from besa_exp.blocks.block import Block, Hidden, capture_blocks, discover_blocks
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.probe import num_probe_samples
from besa_exp.blocks.pruner import PrunedBlock, Pruner
from besa_exp.blocks.reports import Step
from besa_exp.blocks.units import takes_apart, units
from besa_exp.checkpoints.streaming import give_back_memory
from besa_exp.dry_run.meters import PeakMemory, seconds_of
from besa_exp.methods.budgets.budget import Budget
from besa_exp.methods.budgets.trial import Search
from besa_exp.methods.budgets.uniform import Uniform
from besa_exp.tensors.masks import Target
from besa_exp.tensors.statistics import Statistic, by_shared_input

SAMPLES = (3, 8)  # of the two probes; of both a search holds back one
BUDGET = 6.0  # seconds that the passes of all probes should take together
PASSES = 66  # forward passes of one sample in the probes of a search: 11 samples of about 6
SHORTEST = 128  # tokens
FRACTION = 4  # of a length that is too short, the other one that tells how costs grow with it


@dataclass(frozen=True)
class BlockCost:
    """Of one block with all samples: seconds, those of one sample's forward pass, those that a budget takes besides
    such passes, the search's steps (of blocks pruned together, each block's part), and bytes (see `needs.Working`)."""

    seconds: float
    forward_seconds: float
    budget_seconds: float
    steps: float
    statistics: int
    forward: int
    pruner: int


class Watched:
    """A pruner like the one it holds, that notes what its statistics hold and what it holds itself while it decides."""

    def __init__(self, pruner: Pruner, memory: PeakMemory) -> None:
        self.pruner, self.memory = pruner, memory
        self.statistics_bytes = self.observed = self.working = 0

    @property
    def statistic(self) -> type[Statistic] | None:
        return self.pruner.statistic

    @property
    def dense_targets(self) -> bool:
        return self.pruner.dense_targets

    def check(self, sparsity: float, pattern: str) -> list[str]:
        return self.pruner.check(sparsity, pattern)

    def prune_block(
        self,
        block: Block,
        inputs: Hidden,
        targets: Hidden,
        statistics: Mapping[str, Any],
        target: Target,
        on_step: Callable[[Step], None],
    ) -> PrunedBlock:
        self.observed = self.memory.lap()
        self.statistics_bytes = statistics_bytes(statistics)
        held = self.memory.now()
        pruned = self.pruner.prune_block(block, inputs, targets, statistics, target, on_step)
        self.working = max(0, self.memory.lap() - held)
        return pruned


def statistics_bytes(statistics: Mapping[str, Any]) -> int:
    """What the distinct statistics of a block hold."""
    held = [value for statistic, _ in by_shared_input(statistics) for value in vars(statistic).values()]
    return sum(value.nbytes for value in held if isinstance(value, Tensor))


def cut_down(model: PreTrainedModel, device: torch.device, count: int = 1) -> PreTrainedModel:
    """`model`, built without weights, cut down to the largest `count` blocks in a row: random weights in them, and
    outside."""
    path, modules = discover_blocks(model)
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
    count = min(count, len(modules))
    first = max(range(len(modules) - count + 1), key=lambda start: sum(sizes[start : start + count]))
    parent, _, name = path.rpartition(".")
    kept = nn.ModuleList(modules[first : first + count])
    setattr(model.get_submodule(parent), name, kept)
    inside = set(kept.modules())
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                value = _random(parameter, key, module in inside, device, generator)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    model.tie_weights()
    return model.eval()


def _random(like: Tensor, name: str, distinct: bool, device: torch.device, generator: torch.Generator) -> Tensor:
    """Values of usual size; rows may be multiples of one where only their product's cost matters. Those of neighbours
    differ, so that what depends on the tokens is seen."""
    if like.ndim < 2:
        return torch.full(like.shape, 0.0 if name == "bias" else 1.0, dtype=like.dtype, device=device)
    shape = like.shape if distinct else (1, *like.shape[1:])
    drawn = torch.randn(shape, dtype=like.dtype, device=device, generator=generator) * like.shape[-1] ** -0.5
    if distinct:
        return drawn
    scale = 1 + 0.1 * (torch.arange(len(like), device=device) % 7).to(like.dtype)
    return drawn * scale.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class BlockProbe:
    """Prunes the blocks of `model`, which has as many as are pruned together, again and again, `batch_size` samples a
    forward pass of the block loop."""

    model: PreTrainedModel
    device: torch.device
    pruner: Pruner
    target: Target
    batch_size: int
    allocate: Allocate
    budget: Budget | Search | Uniform | None = None
    compute_dtype: torch.dtype | None = None

    def cost(self, samples: int, seq_len: int) -> BlockCost:
        """Expected of a block of a run with so many samples; extrapolated where that would take too long."""
        usual = min(seq_len, 256)
        a_token = self.forward_seconds(1, usual) / usual
        length = int(BUDGET / PASSES / a_token)
        length = max(min(SHORTEST, seq_len), length) if length < 0.75 * seq_len else seq_len
        few, many = (min(count, samples) for count in SAMPLES)
        if self.device.type == "cuda":
            self._measure(few, length)  # kernels are compiled, libraries choose
        large = self._measure(many, length)
        large = replace(large, forward_seconds=a_token * seq_len, budget_seconds=self._budget_seconds(length))
        if many == samples and length == seq_len:
            return large
        small = self._measure(few, length)
        short = self._measure(many, length // FRACTION) if length < seq_len else large
        per_sample, fixed = _line(few, small.seconds, many, large.seconds)
        when_short = max(0.0, short.seconds - fixed) / many
        per_step, no_steps = _line(few, small.steps, many, large.steps)
        judged = num_probe_samples(samples) if large.steps else 0  # they go through the block together
        at_once = max(min(self.batch_size, samples), judged) / min(self.batch_size, many)
        return replace(
            large,
            seconds=fixed + samples * _extrapolated(length, per_sample, when_short, seq_len),
            steps=no_steps + per_step * samples,
            forward=int(at_once * _extrapolated(length, large.forward, short.forward, seq_len)),
            pruner=int(_extrapolated(length, large.pruner, short.pruner, seq_len)),
        )

    def forward_seconds(self, rows: int, length: int) -> float:
        """Of one forward pass of `rows` samples through a block, the better of two."""
        block, hidden = self.block_of_noise(rows, length)
        return min(seconds_of(self.device, lambda: block.outputs(hidden, rows)) for _ in range(2)) / len(block.layers)

    def _budget_seconds(self, length: int) -> float:
        """What the budget takes for a block and one short sample: nearly all is what it does with the weights."""
        block, hidden = self.block_of_noise(1, min(length, SHORTEST))
        return seconds_of(self.device, lambda: self._ask_budget(block, hidden)) / len(block.layers)

    def _ask_budget(self, block: Block, inputs: Hidden) -> None:
        if isinstance(self.budget, Budget):  # it goes through the dense blocks first
            self.budget.sparsities(block.layers, inputs, self.target.sparsity, self.batch_size)

    def block_of_noise(self, rows: int, length: int) -> tuple[Block, Hidden]:
        """The block and inputs for it."""
        return self._block(rows, length), self._noise(rows, length)

    def _block(self, rows: int, length: int) -> Block:
        blocks = capture_blocks(self.model, torch.zeros(rows, length, dtype=torch.int64))
        blocks = [replace(block, compute_dtype=self.compute_dtype) for block in blocks]
        (block,) = units(blocks, len(blocks))
        block.arguments(min(rows, self.batch_size))
        return block

    def _noise(self, samples: int, length: int) -> Hidden:
        hidden, dtype = self.model.config.get_text_config().hidden_size, self.model.dtype
        room = self.allocate(torch.Size([samples, length, hidden]), dtype)
        return room.copy_(torch.randn(room.shape, generator=torch.Generator().manual_seed(0)).to(dtype))

    def _measure(self, samples: int, length: int) -> BlockCost:
        """Prunes the block, which gets its weights back. What a budget holds counts as forward passes do."""
        block, inputs = self.block_of_noise(samples, length)
        kept = {name: linear.weight.detach().clone() for name, linear in block.linears.items()}
        steps: list[Step] = []
        give_back_memory()
        with PeakMemory(self.device) as memory:
            watched = Watched(self.pruner, memory)
            rooms = 3 if self.pruner.dense_targets else 1  # that the block loop makes besides the inputs
            before = memory.now() + (rooms * inputs.nbytes if inputs.device == self.device else 0)

            self._ask_budget(block, inputs.clone())

            def prune() -> None:
                for _ in prune_blocks(
                    [block], inputs, watched, self.target, self.batch_size, steps.append, allocate=self.allocate
                ):
                    pass

            seconds = seconds_of(self.device, prune)
        for name, linear in block.linears.items():
            linear.weight.detach().copy_(kept[name])
        forward = max(0, watched.observed - before - watched.statistics_bytes)
        together = len(block.layers)
        own_targets = inputs.nbytes if takes_apart(self.pruner) else 0  # `needs` counts them, for all samples
        working = max(0, watched.working - own_targets)
        return BlockCost(
            seconds / together, 0.0, 0.0, len(steps) / together, watched.statistics_bytes, forward, working
        )


def _line(x: float, y: float, later_x: float, later_y: float) -> tuple[float, float]:
    """Slope and value at 0, neither below 0, through two points (through 0 and the second where they are one)."""
    slope = (later_y - y) / (later_x - x) if later_x > x else later_y / later_x
    slope = min(max(slope, 0.0), later_y / later_x)
    return slope, later_y - slope * later_x


def _extrapolated(length: int, value: float, when_short: float, wanted: int) -> float:
    """The value at a `wanted` length, linearly from a length and a fraction of it; it never falls."""
    slope = max(0.0, value - when_short) / (length - length // FRACTION)
    return value + min(slope, value / length) * (wanted - length)
