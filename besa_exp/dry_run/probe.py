"""What one block costs on this machine: it is really pruned, on a few samples of noise.

The model is built without weights; its largest block (or two, where two are pruned together) and what is outside the
blocks get random ones. The block loop itself then prunes them with the run's own pruner, so that a method need not know
that it is measured. Costs are linear in the samples, c(n) = fixed + n slope, from two numbers of samples; where a
sample of the run's own length takes too long, shorter ones are taken and the slope grows with the length.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import repeat

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from besa_exp.blocks.activations import Allocate
from besa_exp.blocks.block import Block, Hidden, capture_blocks, discover_blocks
from besa_exp.blocks.head import head_of
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.probe import num_probe_samples
from besa_exp.blocks.pruner import Pruner
from besa_exp.blocks.units import units
from besa_exp.checkpoints.streaming import give_back_memory
from besa_exp.machine.device import seconds_of
from besa_exp.tensors.masks import Goal

SAMPLES = (3, 8)  # of the two measurements; of both a search holds back one
BUDGET = 6.0  # seconds that all measurements should take together
PASSES = 66  # forward passes of one sample in those of a search: 11 samples of about 6
SHORTEST = 128  # tokens


@dataclass(frozen=True)
class BlockCost:
    """Of one block with all samples: seconds, a forward pass's seconds of one sample, steps of a search (its part of
    those of blocks pruned together), and bytes beyond weights and activations."""

    seconds: float
    forward_seconds: float
    steps: float
    working_bytes: int


@dataclass(frozen=True)
class BlockProbe:
    """Prunes the blocks of `model`, which has as many as are pruned together, `batch_size` samples a forward pass."""

    model: PreTrainedModel
    device: torch.device
    pruner: Pruner
    goal: Goal
    batch_size: int
    allocate: Allocate
    compute_dtype: torch.dtype | None = None

    def cost(self, samples: int, seq_len: int) -> BlockCost:
        """Expected of a block of a run with so many samples."""
        usual = min(seq_len, 256)
        a_token = self.forward_seconds(1, usual) / usual
        length = int(BUDGET / PASSES / a_token)
        length = max(min(SHORTEST, seq_len), length) if length < 0.75 * seq_len else seq_len
        few, many = (min(count, samples) for count in SAMPLES)
        if self.device.type == "cuda":
            self._measured(few, length)  # kernels are compiled, libraries choose
        large = self._measured(many, length)
        small = large if many == samples and length == seq_len else self._measured(few, length)
        longer = seq_len / length
        per_sample, fixed = line(few, small.seconds, many, large.seconds)
        per_step, no_steps = line(few, small.steps, many, large.steps)
        rows = [self._rows(count, bool(large.steps)) for count in (few, many, samples)]
        per_row, fixed_bytes = line(rows[0], small.working_bytes, rows[1], large.working_bytes)
        return BlockCost(
            seconds=fixed + samples * per_sample * longer,
            forward_seconds=a_token * seq_len,
            steps=no_steps + per_step * samples,
            working_bytes=int(fixed_bytes + rows[2] * per_row * longer),
        )

    def forward_seconds(self, rows: int, length: int) -> float:
        """Of one forward pass of `rows` samples through a block, the better of two."""
        block, hidden = self.block_of_noise(rows, length)
        return min(seconds_of(self.device, lambda: block.outputs(hidden, rows)) for _ in range(2)) / len(block.layers)

    def head_seconds(self, rows: int, length: int) -> float:
        """Of `rows` samples outside the blocks, their log-probabilities included, the better of two."""
        block, hidden = self.block_of_noise(rows, length)
        head = head_of(self.model, block.layers, torch.zeros(rows, length, dtype=torch.int64))
        with torch.no_grad():
            return min(seconds_of(self.device, lambda: head(hidden).float().log_softmax(-1)) for _ in range(2))

    def passes(self, ask: Callable[[Iterable[Block], Hidden], object], num_blocks: int, samples: int) -> float:
        """How many times a sample passes a block when `ask` is given a model of so many blocks. Counted on samples of a
        few tokens in models of 1, 2 and 3 blocks: it may grow with the square of the blocks."""
        given, hidden = self.block_of_noise(samples, 4)
        block = given.layers[0]
        counts: list[float] = []
        for depth in (1, 2, 3):
            counts.append(0.0)

            def count(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                counts[-1] += len(given[0])

            with block.module.register_forward_pre_hook(count):
                ask(repeat(block, depth), hidden.clone())
        rise = counts[1] - counts[0]
        bend = (counts[2] - counts[1]) - rise
        return counts[0] + (num_blocks - 1) * rise + bend * (num_blocks - 1) * (num_blocks - 2) / 2

    def block_of_noise(self, rows: int, length: int) -> tuple[Block, Hidden]:
        """The block and inputs for it."""
        blocks = capture_blocks(self.model, torch.zeros(rows, length, dtype=torch.int64))
        (block,) = units([replace(block, compute_dtype=self.compute_dtype) for block in blocks], len(blocks))
        block.arguments(min(rows, self.batch_size))
        hidden, dtype = self.model.config.get_text_config().hidden_size, self.model.dtype
        room = self.allocate(torch.Size([rows, length, hidden]), dtype)
        return block, room.copy_(torch.randn(room.shape, generator=torch.Generator().manual_seed(0)).to(dtype))

    def _rows(self, samples: int, searches: bool) -> int:
        """Samples that pass the block together at most; a search passes its probe samples at once."""
        return max(min(self.batch_size, samples), num_probe_samples(samples) if searches else 0)

    def _measured(self, samples: int, length: int) -> BlockCost:
        """Prunes the block, which gets its weights back."""
        block, inputs = self.block_of_noise(samples, length)
        kept = {name: linear.weight.detach().clone() for name, linear in block.linears.items()}
        steps: list[object] = []

        def prune() -> None:
            for _ in prune_blocks(
                [block], inputs, self.pruner, self.goal, self.batch_size, steps.append, allocate=self.allocate
            ):
                pass

        give_back_memory()
        with PeakMemory(self.device) as memory:
            rooms = 3 if self.pruner.traits.dense_targets else 1  # that the block loop makes besides the inputs
            before = memory.now() + (rooms * inputs.nbytes if inputs.device == self.device else 0)
            seconds = seconds_of(self.device, prune)
            working = max(0, memory.peak() - before)
        for name, linear in block.linears.items():
            linear.weight.detach().copy_(kept[name])
        together = len(block.layers)
        return BlockCost(seconds / together, 0.0, len(steps) / together, working)


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


def line(x: float, y: float, later_x: float, later_y: float) -> tuple[float, float]:
    """Slope and value at 0, neither below 0, through two points (through 0 and the second where they are one)."""
    slope = (later_y - y) / (later_x - x) if later_x > x else later_y / later_x
    slope = min(max(slope, 0.0), later_y / later_x)
    return slope, later_y - slope * later_x


class PeakMemory:
    """The most memory held since it was entered: torch's own on a CUDA device, else this process's resident bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._process, self._most, self._ended = device, psutil.Process(), 0, threading.Event()

    def __enter__(self) -> PeakMemory:
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def now(self) -> int:
        """Bytes held at this moment."""
        on_cuda = self.device.type == "cuda"
        return torch.cuda.memory_allocated(self.device) if on_cuda else self._process.memory_info().rss

    def peak(self) -> int:
        """The most bytes until now."""
        on_cuda = self.device.type == "cuda"
        return torch.cuda.max_memory_allocated(self.device) if on_cuda else max(self._most, self.now())

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self._most = max(self._most, self._process.memory_info().rss)
