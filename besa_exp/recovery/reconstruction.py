"""Block reconstruction of the whole pruned model: each window of blocks is to give the dense model's states again.

    minimise  mean over windows u of  sum_t ||H_ut - f_u(X_u)_t||^2 / ||H_ut||  /  sum_t ||H_ut||

f_u is a window of the pruned model (one block, two, four, or a block's attention or MLP), X_u what the windows before
make of the text, from which no gradient comes, and H_u the state of the dense model at the same place. So a window also
makes up for the error of those before it. Block-wise tuning of kept weights is known from EBFT (Guo et al., arXiv
2402.12419); `methods.tuning` does it to one block after the other on stored calibration states. Here all windows learn
from the same text at once: a batch goes through both models side by side, and a window's part of the graph is gone
before the next begins. No state is stored, text may be of any length, and a step costs a forward pass of the dense
model beside one of `full`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from besa_exp.blocks.block import Block, Hidden, capture_blocks, discover_blocks, embed
from besa_exp.blocks.units import sub_blocks, units
from besa_exp.errors import ConfigurationError
from besa_exp.recovery.descent import Adam, Descent
from besa_exp.recovery.full import Kept
from besa_exp.recovery.objective import differentiated
from besa_exp.recovery.tuner import Logits, Windows
from besa_exp.rules import check_fields, one_of
from besa_exp.tensors.keep_bits import KeepBits
from besa_exp.tensors.losses import weighted_errors

BLOCKS_OF = {"sub_block": 1, "block": 1, "pair": 2, "four": 4}


@dataclass(frozen=True)
class Blocks:
    """Everything in the blocks is tuned: kept weights, norms and biases. `scope`: the windows, one of BLOCKS_OF; the
    objective is a `Reconstruction`."""

    adam: Adam = field(default_factory=lambda: Adam(lr=3e-4))
    scope: Annotated[str, one_of(*BLOCKS_OF)] = "block"

    def __post_init__(self) -> None:
        check_fields(self, "recovery")

    def begin(self, model: nn.Module, keep: Mapping[str, KeepBits], seed: int) -> Descent:
        inside = f"{discover_blocks(model)[0]}."
        named = {name: parameter for name, parameter in model.named_parameters() if name.startswith(inside)}
        forms = {name: Kept.of(parameter, keep.get(name)) for name, parameter in named.items()}
        return Descent(model, forms, self.adam, keep)


@dataclass(frozen=True)
class Window:
    """A part of the tuned model, the same part of the dense one, and the parameters that learn from its error."""

    tuned: Block
    dense: Block
    learning: Sequence[nn.Parameter]


@dataclass(frozen=True)
class Reconstruction:
    """An objective (`tuner.Objective`). `groups`: the windows in order; those of one group all begin at the same place,
    and the last one's end is where the next group begins. `first`: the first block of either model. `micro_batch`
    windows of text pass together."""

    model: nn.Module
    teacher: nn.Module
    first: list[Block]
    groups: Sequence[Sequence[Window]]
    micro_batch: int

    @staticmethod
    def of(model: nn.Module, teacher: nn.Module, scope: str, micro_batch: int, seq_len: int) -> Reconstruction:
        """`scope` is one of BLOCKS_OF. ConfigurationError: the dense model has other blocks; RunError: a block's
        attention and MLP cannot be parted."""
        shape = torch.zeros(micro_batch, seq_len, dtype=torch.long)
        together = BLOCKS_OF[scope]
        tuned, dense = (units(capture_blocks(side, shape), together) for side in (model, teacher))
        if len(tuned) != len(dense):
            raise ConfigurationError("recovery=blocks: the dense model has another number of blocks; use recovery=full")
        pairs = zip(tuned, dense, strict=True)
        first = [tuned[0].layers[0], dense[0].layers[0]]
        sample = embed(model, first[:1], shape[:1], 1)
        if scope == "sub_block":
            groups = [_parted(*pair, sample) for pair in pairs]
        else:
            groups = [[Window(*pair, [*pair[0].module.parameters()])] for pair in pairs]
        return Reconstruction(model, teacher, first, groups, micro_batch)

    def differentiate(self, windows: Windows) -> tuple[float, float]:
        share = 1 / (windows.numel() * sum(map(len, self.groups)))

        def losses_of(part: Windows) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
            for errors, learning in self._errors(part):
                yield errors.sum() * share, [parameter for parameter in learning if parameter.requires_grad]

        return differentiated(self.model, windows, self.micro_batch, losses_of)

    def of_logits(self, logits: Logits, windows: Windows) -> Float[Tensor, ""]:
        """ValueError: this is no loss of logits."""
        raise ValueError("recovery=blocks compares hidden states, which this method does not compute")

    def _errors(self, text: Windows) -> Iterator[tuple[Float[Tensor, "sample seq"], Sequence[nn.Parameter]]]:
        """Of each window the error of every token, and what learns from it."""
        states = embed(self.model, self.first[:1], text, self.micro_batch)
        expected = embed(self.teacher, self.first[1:], text, self.micro_batch)
        for group in self.groups:
            for window in group:
                reached = window.tuned(states)
                with torch.no_grad():
                    targets = window.dense(expected)
                yield weighted_errors(reached, targets), window.learning
            states, expected = reached.detach(), targets


def _parted(tuned: Block, dense: Block, sample: Hidden) -> list[Window]:
    """Attention and MLP apart: a part learns with what it needs and no part before it does."""
    left = [*tuned.module.parameters()]
    windows = []
    for (part, _), (dense_part, _) in zip(sub_blocks(tuned, sample), sub_blocks(dense, sample), strict=True):
        is_last = part is tuned
        own = left if is_last else _needed(part, sample, left)
        windows.append(Window(part, dense_part, own))
        left = [parameter for parameter in left if all(parameter is not other for other in own)]
    return windows


def _needed(part: Block, sample: Hidden, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Those of the parameters that the part's output depends on."""
    learned = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_()
    with torch.enable_grad():
        found = torch.autograd.grad(part(sample).sum(), parameters, allow_unused=True)
    for parameter, before in zip(parameters, learned, strict=True):
        parameter.requires_grad_(before)
    return [parameter for parameter, gradient in zip(parameters, found, strict=True) if gradient is not None]
