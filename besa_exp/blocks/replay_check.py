"""The proof, at the start of every run, that blocks called on their own compute what the model computes with them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from besa_exp.blocks.block import Block, Hidden, discover_blocks, embed
from besa_exp.blocks.call_arguments import Reached, check_unwritten, hidden_of
from besa_exp.blocks.linears import LOOKED_FOR, watch
from besa_exp.errors import RunError
from besa_exp.tensors.statistics import is_finite


@torch.no_grad()
def check_replay(
    model: nn.Module,
    blocks: list[Block],
    input_ids: Int[Tensor, "sample seq"],
    resident: Callable[[list[Block]], Iterable[Block]] = iter,
) -> None:
    """Prove that replaying `blocks`, the first ones or all, reproduces the model's own hidden states for `input_ids`,
    that their linears are called, and that they hand on nothing but hidden states. `resident` gives blocks, each with
    its weights while it is out. RunError names the first block that does not, or a linear that is not called."""
    used = [block.arguments(len(input_ids)) for block in blocks]  # by passes that must not meet the hooks
    replay = _Replay(blocks, resident, embed(model, blocks, input_ids, len(input_ids)))
    with ExitStack() as hooks:
        hooks.callback(replay.end)
        for block in blocks:
            note = partial(_note, replay.called, block.index)
            hooks.enter_context(watch(block.linears, note, note))
            hooks.enter_context(block.module.register_forward_pre_hook(partial(replay.before, block)))
            hooks.enter_context(block.module.register_forward_hook(partial(replay.after, block)))
        with suppress(Reached):
            model(input_ids.to(next(model.parameters()).device), use_cache=False)
    check_unwritten(model, discover_blocks(model)[1], input_ids, used)


@dataclass
class _Replay:
    """Each block is called a second time, on its own, right after the model has called it, while its weights are there:
    `hidden` is what the blocks before it have made of the first one's inputs."""

    blocks: list[Block]
    resident: Callable[[list[Block]], Iterable[Block]]
    hidden: Hidden
    called: set[tuple[int, str]] = field(default_factory=set)
    held: Iterator[Block] | None = None
    replaying: bool = False

    def before(self, block: Block, module: nn.Module, args: object) -> None:
        if not self.replaying:
            self.held = iter(self.resident([block]))
            next(self.held)

    def after(self, block: Block, module: nn.Module, args: object, output: Any) -> None:
        if self.replaying:
            return
        self.replaying = True
        self.hidden = block(self.hidden)
        self.replaying = False
        expected = hidden_of(output).float()
        if not is_finite(expected):
            raise RunError(
                f"{block.name}: the model's hidden states are not finite on the calibration tokens: it is broken as "
                f"it is saved, or overflows in {str(self.hidden.dtype).removeprefix('torch.')}; set "
                "model.dtype=float32 or bfloat16"
            )
        error = (self.hidden.float() - expected).norm() / expected.norm()
        if not error < 1e-3:
            raise RunError(
                f"{block.name}: replaying the block does not reproduce the model's own hidden states (relative error "
                f"{float(error):.2e}); the model calls its blocks in a way the block loop does not know. "
                "Please report the model's class and the transformers version."
            )
        _check_called(block, self.called)
        self.end()
        if block is self.blocks[-1]:
            raise Reached

    def end(self) -> None:
        """Lets the weights of the block that is out go."""
        if isinstance(self.held, Generator):
            self.held.close()
        self.held = None


def _note(called: set[tuple[int, str]], index: int, name: str, inputs: Tensor) -> None:
    called.add((index, name))


def _check_called(block: Block, called: set[tuple[int, str]]) -> None:
    idle = [
        name
        for name, linear in block.linears.items()
        if (block.index, name) not in called and (linear.expert is not None or not linear.of_mixture)
    ]
    if idle:
        raise RunError(
            f"{block.name}.{idle[0]}: {type(block.module).__name__} uses this weight without calling the module that "
            "holds it, so that its inputs cannot be observed; such a model cannot be pruned here. "
            f"Looked for {LOOKED_FOR}"
        )
