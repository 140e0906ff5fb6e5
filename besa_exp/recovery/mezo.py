"""MeZO: steps from two forward passes, with the memory of inference (Malladi et al., arXiv 2305.17333).

    g = (L(W + eps z) - L(W - eps z)) / (2 eps),   z ~ N(0, 1);   W <- W - lr (g z + decay W)

The authors add +eps z, -2 eps z and +eps z to the model and hope to be back where they began: in bf16 that drifts by as
much as eps z. Here nothing is added to the model. Both passes go through the block loop side by side: a block's weights
W + eps z, then W - eps z, are made beside the model while that block computes, so that memory is that of inference and
one block, and weights are read once for both.

z is made from (seed, step, name of the tensor) alone, on the CPU: the same in whatever order tensors come, and on
every device and rank. It has a number for each kept weight, so that zeros stay zeros. All of a run follows from the
pruned weights and two numbers a step, g and the step size: they are the checkpoint, and to go on is to take the same
steps again.

Of a streamed model one block is in memory at a time. The step of a block is taken when it comes to memory for the next
one, just before both passes go through it, and what it became is kept in a file until then: a step reads and writes the
model once.

A step of lr g z is below half a unit in the last place of a weight in bf16, and would be lost: there the new weight is
rounded at random to one of its two neighbours, the nearer the likelier, by numbers from the same key.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from besa_exp.blocks.block import Block, Hidden, capture_blocks, discover_blocks, embed
from besa_exp.blocks.head import head_logits
from besa_exp.checkpoints.streaming import on_demand
from besa_exp.machine import distributed
from besa_exp.recovery.objective import sequences
from besa_exp.recovery.schedule import key_of
from besa_exp.recovery.tuner import Objective, Taken, Windows
from besa_exp.rules import Count, NotNegative, Positive, check_fields
from besa_exp.tensors.keep_bits import KeepBits, kept_values, put_kept


@dataclass(frozen=True)
class BlockFiles:
    """Where the pruned weights of a streamed model's blocks come from, and a folder for what they become."""

    load: Callable[[str, nn.Module], None]
    release: Callable[[nn.Module], None]
    folder: Path


@dataclass(frozen=True)
class Mezo:
    """`decay` spares norms and biases. `together`: how many windows pass a block at once. `files`: of a streamed
    model's blocks."""

    lr: Positive = 1e-5
    eps: Positive = 1e-3
    decay: NotNegative = 0.0
    together: Count = 8
    files: BlockFiles | None = None

    def __post_init__(self) -> None:
        check_fields(self, "recovery")

    def begin(self, model: nn.Module, keep: Mapping[str, KeepBits], seed: int) -> MezoTuner:
        """All parameters, each tied one once. Steps would be lost in fp16 (`recipe.check_fit`)."""
        if self.files is not None:
            shutil.rmtree(self.files.folder, ignore_errors=True)
            self.files.folder.mkdir(parents=True)
        return MezoTuner(model, self, keep, seed)


class MezoTuner:
    """A tuner (`tuner.Tuner`). Of a model whose blocks lie in files `parameters` are those outside the blocks."""

    def __init__(self, model: nn.Module, settings: Mezo, keep: Mapping[str, KeepBits], seed: int) -> None:
        self.model, self.settings, self.keep, self.seed, self.files = model, settings, keep, seed, settings.files
        self.parameters = {name: own for name, own in model.named_parameters() if not own.is_meta}
        self.done: dict[str, int] = {}  # steps that the file of each block has taken
        self.noise = lambda step, name, count: normal(count, key_of("z", seed, step, name))
        self.projected: list[float] = []
        self.rates: list[float] = []
        self.captured: dict[torch.Size, list[Block]] = {}

    def step(self, objective: Objective, windows: Windows, number: int, scale: float) -> Taken:
        """Two passes, and a step along z. The loss returned is the mean of both."""
        plus, minus = self.losses(objective, windows, number)
        projected, rate = (plus - minus) / (2 * self.settings.eps), self.settings.lr * scale
        if math.isfinite(projected):
            assert number == len(self.projected), "steps are taken in order"
            self.update(number, projected, rate)
        return Taken((plus + minus) / 2)

    def state(self) -> dict[str, Tensor]:
        """g and the step size of each step."""
        return {
            "projected": torch.tensor(self.projected, dtype=torch.float64),
            "rates": torch.tensor(self.rates, dtype=torch.float64),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the same steps again."""
        steps = zip(state["projected"].tolist(), state["rates"].tolist(), strict=True)
        for number, (projected, rate) in enumerate(steps):
            self.update(number, projected, rate)

    def ready(self) -> AbstractContextManager[None]:
        if self.files is None:
            return nullcontext()
        path, modules = discover_blocks(self.model)
        blocks = {f"{path}.{index}": module for index, module in enumerate(modules)}
        return on_demand(blocks, self._load, self.files.release)

    @torch.no_grad()
    def losses(self, objective: Objective, windows: Windows, number: int) -> tuple[float, float]:
        """L(W + eps z) and L(W - eps z) of the windows of all ranks, side by side through the blocks."""
        own = distributed.own_samples(windows)
        totals = torch.zeros(2, dtype=torch.float64)
        if len(own):
            rows = sequences(own)
            blocks = self._blocks(rows)
            states = self._embedded(blocks, rows, number)
            for block in self._resident(blocks):
                inside = dict(block.module.named_parameters(prefix=block.name))
                with closing(self._sides(inside, number)) as sides:
                    for side in sides:
                        block.outputs(states[side], self.settings.together, out=states[side])
            with closing(self._sides(self._outside(blocks, self._only_at(entry=True)), number)) as sides:
                for side in sides:
                    totals[side] = self._loss(objective, blocks, own, states[side])
        plus, minus = (distributed.all_sum(totals) / len(windows)).tolist()
        return plus, minus

    @torch.no_grad()
    def update(self, number: int, projected: float, rate: float) -> None:
        """W <- W - rate (g z + decay W) at the kept places; of blocks in files when they come to memory next."""
        self.projected.append(projected)
        self.rates.append(rate)
        for name, parameter in self.parameters.items():
            self._move(number, name, parameter)

    @torch.no_grad()
    def catch_up(self, name: str, module: nn.Module, done: int) -> None:
        """Take the steps from number `done` on with the block of this name."""
        for own, parameter in module.named_parameters():
            for number in range(done, len(self.projected)):
                self._move(number, f"{name}.{own}", parameter)

    def _move(self, number: int, name: str, parameter: Tensor) -> None:
        kept = self._kept(name, parameter)
        step = self.projected[number] * self._z(number, name, parameter)
        if self.settings.decay and parameter.dim() > 1:
            step = step + self.settings.decay * kept
        moved = kept - self.rates[number] * step
        if parameter.dtype == torch.bfloat16:
            moved = rounded_at_random(moved, key_of("rounding", self.seed, number, name))
        put_kept(moved, parameter.detach(), self.keep.get(name))

    def _resident(self, blocks: list[Block]) -> Iterator[Block]:
        """The blocks in order, each with its weights while it is out."""
        for block in blocks:
            if self.files is None:
                yield block
                continue
            self._load(block.name, block.module)
            try:
                yield block
            finally:
                self.files.release(block.module)

    @torch.no_grad()
    def _load(self, name: str, module: nn.Module) -> None:
        """Put the weights after all steps so far into a block; its file keeps them for the next time."""
        assert self.files is not None
        file, done = self.files.folder / f"{name}.safetensors", self.done.get(name, 0)
        self.files.load(name, module)
        if done:
            for own, value in load_file(file).items():
                module.get_parameter(own).copy_(value)
        if done < len(self.projected):
            self.catch_up(name, module, done)
            save_file({own: value.cpu().contiguous() for own, value in module.named_parameters()}, file)
            self.done[name] = len(self.projected)

    def _blocks(self, windows: Windows) -> list[Block]:
        """The blocks, with call arguments for windows of this shape."""
        if windows.shape not in self.captured:
            self.captured = {windows.shape: capture_blocks(self.model, windows)}
        return self.captured[windows.shape]

    def _embedded(self, blocks: list[Block], windows: Windows, number: int) -> list[Hidden]:
        with closing(self._sides(self._outside(blocks, self._only_at(entry=False)), number)) as sides:
            return [embed(self.model, blocks, windows, self.settings.together) for _ in sides]

    def _loss(
        self,
        objective: Objective,
        blocks: list[Block],
        windows: Windows,
        hidden: Float[Tensor, "sequence _seq hidden"],
    ) -> Tensor:
        modules, ids = [block.module for block in blocks], sequences(windows).to(hidden.device, non_blocking=True)
        total = torch.zeros((), dtype=torch.float64)
        together = self.settings.together
        options = len(hidden) // len(windows)  # of an example; a window has one sequence
        for part, states in zip(windows.split(together), hidden.split(together * options), strict=True):
            logits = head_logits(self.model, modules, ids[: len(states)], states)
            total = total + objective.of_logits(logits, part).double()
        return total

    def _outside(self, blocks: list[Block], but: set[nn.Parameter]) -> dict[str, nn.Parameter]:
        """The parameters of no block, but these."""
        inside = tuple(f"{block.name}." for block in blocks)
        named = self.parameters.items()
        return {name: own for name, own in named if not name.startswith(inside) and own not in but}

    def _only_at(self, entry: bool) -> set[nn.Parameter]:
        """The parameters that are used at the model's entry alone, or at its end alone: embeddings and head, untied.
        They are the largest, and need not be perturbed at the other."""
        model: Any = self.model
        first, last = (
            set(module.parameters()) if module is not None else set()
            for module in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        return first - last if entry else last - first

    def _sides(self, parameters: Mapping[str, nn.Parameter], number: int) -> Generator[int, None, None]:
        """0 while the parameters hold W + eps z, in memory of their own, then 1 while they hold W - eps z: what lies as
        far on the other side of W, so that z is drawn once and not kept."""
        before = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                moved = self._kept(name, parameter) + self.settings.eps * self._z(number, name, parameter)
                parameter.data = parameter.detach().clone()
                put_kept(moved, parameter.data, self.keep.get(name))
            yield 0
            for name, parameter in parameters.items():
                mirrored = 2 * self._kept(name, before[name]) - self._kept(name, parameter)
                put_kept(mirrored, parameter.data, self.keep.get(name))
            yield 1
        finally:
            for name, parameter in parameters.items():
                parameter.data = before[name]

    def _z(self, number: int, name: str, parameter: Tensor) -> Float[Tensor, " kept"]:
        count = self.keep[name].count if name in self.keep else parameter.numel()
        return self.noise(number, name, count).to(parameter.device)

    def _kept(self, name: str, parameter: Tensor) -> Float[Tensor, " kept"]:
        """The kept values in fp32, or in fp64 where the model is."""
        values = kept_values(parameter.detach(), self.keep.get(name))
        return values.to(torch.promote_types(values.dtype, torch.float32))


def normal(count: int, key: int) -> Float[Tensor, " kept"]:
    """`count` numbers of N(0, 1) that follow from the key alone."""
    return torch.randn(count, generator=torch.Generator().manual_seed(key))


def rounded_at_random(values: Float[Tensor, " kept"], key: int) -> Float[Tensor, " kept"]:
    """Each number as one of the two of bf16 around it, with the mean of the number itself: bf16 is the upper half of
    fp32's bits, and a uniform lower half that is added carries with the right probability."""
    generator = torch.Generator().manual_seed(key)
    lower = torch.randint(0, 1 << 16, values.shape, generator=generator, dtype=torch.int32).to(values.device)
    bits: Int[Tensor, " kept"] = values.view(torch.int32) + lower
    return (bits & -(1 << 16)).view(torch.float32)
