"""What one block costs on this machine: it is really pruned, on samples of noise.

The model is built without weights; its largest block (or two, where two are pruned together) and what is outside the
blocks get random ones. The block loop itself then prunes them with the run's own pruner, so that a method need not know
that it is measured. Where that takes too long, costs are linear in the samples, c(n) = fixed + n slope, from two
numbers of samples, or of shorter ones; the slope then grows with the length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from besa_exp.blocks.activations import Allocate
from besa_exp.blocks.block import Block, Hidden, capture_blocks, discover_blocks
from besa_exp.blocks.head import head_logits
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.probe import num_probe_samples
from besa_exp.blocks.pruner import Pruner
from besa_exp.blocks.units import units
from besa_exp.machine.device import memory_taken, seconds_of
from besa_exp.machine.memory import give_back_memory
from besa_exp.tensors.masks import Goal

BUDGET = 6.0  # seconds that a block may take to be measured as it is
PASSES = 6  # forward passes that a search takes
SAMPLES = (4, 12)  # where it would take longer: between them lies a whole batch of the usual size
LONG, FEWEST = 30.0, (1, 3)  # where these would take more seconds, as a block of a 7B model on a CPU: so many
SLOW = 1.0  # seconds that a batch or a step may take; a smaller one is measured where it takes longer
SHORTEST = 128  # tokens


class Probed(NamedTuple):
    """Of one block: seconds and steps of a search, and bytes beyond weights and activations."""

    seconds: float
    steps: float
    working: float


@dataclass(frozen=True)
class BlockProbe:
    """Prunes the blocks of `model`, which has as many as are pruned together, `batch_size` samples of `seq_len` tokens
    in a forward pass of the run."""

    model: PreTrainedModel
    device: torch.device
    pruner: Pruner
    goal: Goal
    batch_size: int
    seq_len: int
    allocate: Allocate
    compute_dtype: torch.dtype | None = None

    def cost(self, samples: int) -> Probed:
        """Expected of a block of a run with so many samples."""
        a_token = PASSES * self.token_seconds[0]
        self.prune(1, min(SHORTEST, self.seq_len))  # what is done once, as kernels are compiled and libraries choose
        if samples * self.seq_len * a_token <= BUDGET:
            return self.prune(samples, self.seq_len)
        length = int(BUDGET / (sum(SAMPLES) * a_token))
        length = max(min(SHORTEST, self.seq_len), length) if length < 0.75 * self.seq_len else self.seq_len
        pair = SAMPLES if sum(SAMPLES) * length * a_token <= LONG else FEWEST
        counts = few, many, _ = *(min(number, samples) for number in pair), samples
        small, large = self.prune(few, length), self.prune(many, length)
        # Samples that pass the block together at most; a search passes its probe samples at once.
        rows = [max(min(self.batch_size, count), num_probe_samples(count) * bool(large.steps)) for count in counts]
        per_sample, fixed = line(few, small.seconds, many, large.seconds)
        per_row, held = line(rows[0], small.working, rows[1], large.working)
        longer = self.seq_len / length
        return Probed(fixed + samples * per_sample * longer, large.steps, held + rows[2] * per_row * longer)

    @cached_property
    def token_seconds(self) -> tuple[float, float]:
        """Of a token in the block and outside the blocks, log-probabilities included: of a batch of the run or, where
        that is slow, of a part of one."""
        short = min(self.seq_len, SHORTEST)
        tokens = int(SLOW / sum(self._token_seconds(1, short)))
        length = max(short, min(self.seq_len, tokens))
        return self._token_seconds(max(1, min(self.batch_size, tokens // length)), length)

    @torch.no_grad()
    def _token_seconds(self, rows: int, length: int) -> tuple[float, float]:
        """The mean of two."""
        block, hidden = self.block_of_noise(rows, length)
        modules, ids = [part.module for part in block.layers], torch.zeros(rows, length, dtype=torch.int64)

        def head() -> Tensor:
            return head_logits(self.model, modules, ids.to(self.device), hidden.to(self.device)).float().log_softmax(-1)

        def seconds(work: Callable[[], Tensor]) -> float:
            return sum(seconds_of(self.device, work) for _ in range(2)) / (2 * rows * length)

        return seconds(lambda: block.outputs(hidden, rows)) / len(modules), seconds(head)

    def block_of_noise(self, rows: int, length: int) -> tuple[Block, Hidden]:
        blocks = capture_blocks(self.model, torch.zeros(rows, length, dtype=torch.int64))
        (block,) = units([replace(block, compute_dtype=self.compute_dtype) for block in blocks], len(blocks))
        block.arguments(min(rows, self.batch_size))
        hidden, dtype = self.model.config.get_text_config().hidden_size, self.model.dtype
        room = self.allocate(torch.Size([rows, length, hidden]), dtype)
        return block, room.copy_(torch.randn(room.shape, generator=torch.Generator().manual_seed(0)).to(dtype))

    def prune(self, samples: int, length: int) -> Probed:
        """Prunes the block, which gets its weights back."""
        block, inputs = self.block_of_noise(samples, length)
        kept = {name: linear.weight.detach().clone() for name, linear in block.linears.items()}
        rooms = 3 if self.pruner.traits.dense_targets else 1  # that the block loop makes besides the inputs
        steps: list[object] = []
        give_back_memory()
        taken = memory_taken(self.device)
        pruning = prune_blocks(
            [block], inputs, self.pruner, self.goal, self.batch_size, steps.append, allocate=self.allocate
        )
        seconds = seconds_of(self.device, partial(deque, pruning, 0))
        working = max(inputs.nbytes, taken() - rooms * inputs.nbytes * (inputs.device == self.device))
        for name, linear in block.linears.items():
            linear.weight.detach().copy_(kept[name])
        return Probed(seconds / len(block.layers), len(steps) / len(block.layers), working)


def cut_down(model: PreTrainedModel, device: torch.device, count: int = 1) -> PreTrainedModel:
    """`model`, built without weights, cut down to the largest `count` blocks in a row: random weights in them, and
    outside."""
    path, modules = discover_blocks(model)
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in modules]
    count = min(count, len(modules))
    first = max(range(len(modules) - count + 1), key=lambda start: sum(sizes[start : start + count]))
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(modules[first : first + count]))
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for key, like in module._parameters.items():
            if like is not None:  # rows that differ show what depends on the tokens
                value = torch.full(like.shape, 0.0 if key == "bias" else 1.0, dtype=like.dtype, device=device)
                if like.ndim > 1:
                    value.uniform_(-1, 1, generator=generator).mul_((3 / like.shape[-1]) ** 0.5)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
    model.tie_weights()
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]


@contextmanager
def kept_for_the_way_back(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[Callable[[], tuple[int, int]]]:
    """What gives the bytes that autograd keeps of the passes within: in `modules`, and outside them. Tensors that share
    memory count once, and parameters, which are there anyway, not at all."""
    kept: dict[int, tuple[int, bool]] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    depth = [0]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.setdefault(storage.data_ptr(), (storage.nbytes(), depth[0] > 0))
        return tensor

    def step(by: int, *_: object) -> None:
        depth[0] += by

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(partial(step, 1)))
            hooks.enter_context(module.register_forward_hook(partial(step, -1)))
        hooks.enter_context(saved_tensors_hooks(keep, lambda tensor: tensor))
        yield lambda: (
            sum(size for size, inside in kept.values() if inside),
            sum(size for size, inside in kept.values() if not inside),
        )


def line(x: float, y: float, later_x: float, later_y: float) -> tuple[float, float]:
    """Slope and value at 0, neither below 0, through two points (through 0 and the second where they are one)."""
    slope = (later_y - y) / (later_x - x) if later_x > x else later_y / later_x
    slope = min(max(slope, 0.0), later_y / later_x)
    return slope, later_y - slope * later_x
