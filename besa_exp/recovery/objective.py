"""What a tuned model is judged by: the next token, and how far it is from the dense model.

    none:        CE = mean over tokens of -log q(next token)
    logits:      task_weight CE + weight T^2 KL(p^(1/T) || q^(1/T)), p the dense model's distribution (arXiv 1503.02531)
    squarehead:  task_weight CE + weight sum over blocks of  sum (h* - h)^2 / sum h*^2, h* the dense model's hidden
                 state (Kurtic et al., arXiv 2310.06927)

SquareHead's ratio is one of each window here, and one of each micro-batch in the authors' code (`train_sparse.py` of
IST-DASLab/SparseFinetuning); so no loss depends on how a batch is cut into parts or dealt out to ranks. The last
block's state is the one that the head reads, after the final norm, as there. All sums are of fp32 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from besa_exp.blocks.block import discover_blocks
from besa_exp.blocks.head import divergence
from besa_exp.blocks.linears import replaced_forwards
from besa_exp.errors import ConfigurationError
from besa_exp.machine import distributed
from besa_exp.recovery.tuner import Logits, Windows
from besa_exp.rules import NotNegative, Positive, check_fields
from besa_exp.settings import Distilled
from besa_exp.texts.tasks import Options

Losses = Callable[[Logits, Windows], Float[Tensor, " sample"]]
"""The loss of each window, or of each example of a task, by the logits of its `sequences`."""

SMALLEST = 1e-30  # of a sum of squares: a state of zeros is not divided by zero


@dataclass(frozen=True)
class Distillation:
    """What of the dense model's is followed, and how much."""

    distill: Distilled = "none"
    distill_weight: NotNegative = 1.0
    task_weight: NotNegative = 1.0
    temperature: Positive = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "recovery")
        if self.distill_weight == self.task_weight == 0:
            raise ValueError("recovery.distill_weight=0, recovery.task_weight=0: nothing is learned; raise one of them")


def next_token_losses(logits: Logits, windows: Windows) -> Float[Tensor, " sample"]:
    """The mean over the tokens of each window, but the first, of -log q(token), in fp32."""
    flat = logits[:, :-1].float().flatten(0, 1)
    losses = nn.functional.cross_entropy(flat, windows[:, 1:].flatten(), reduction="none")
    return losses.view(len(windows), -1).mean(dim=1)


@dataclass(frozen=True)
class NextToken:
    """The loss of `model`, whose `teacher`, the dense model, is there where one is followed. `micro_batch` windows pass
    the model together; `checkpointing`: of each block the inputs alone are kept for the way back, and it is computed
    twice. `losses`: those of a task's options in the place of the next token's."""

    model: nn.Module
    distillation: Distillation = Distillation()
    teacher: nn.Module | None = None
    micro_batch: int = 1
    checkpointing: bool = False
    losses: Losses = next_token_losses

    def __post_init__(self) -> None:
        if (self.distillation.distill != "none") != (self.teacher is not None):
            raise ConfigurationError(
                f"recovery.distill={self.distillation.distill}: a dense model is given exactly where one is followed"
            )

    def differentiate(self, windows: Windows) -> tuple[float, float]:

        def losses_of(part: Windows) -> Iterator[tuple[Tensor, None]]:
            logits, states = called(self.model, part, self.distillation.distill == "squarehead")
            yield self._of(logits, states, part) / len(windows), None

        with checkpointed(self.model) if self.checkpointing else nullcontext():
            return differentiated(self.model, windows, self.micro_batch, losses_of)

    def of_logits(self, logits: Logits, windows: Windows) -> Float[Tensor, ""]:
        """See `tuner.Objective`. ValueError: more than logits is followed."""
        if self.distillation.distill == "squarehead":
            raise ValueError(
                "recovery.distill=squarehead: needs hidden states, which this method does not compute; use logits"
            )
        return self._of(logits, (), windows)

    def _of(self, logits: Logits, states: tuple[Tensor, ...], windows: Windows) -> Float[Tensor, ""]:
        windows = windows.to(logits.device, non_blocking=True)
        distillation = self.distillation
        loss = self.losses(logits, windows).sum()
        if distillation.distill == "none" or self.teacher is None:
            return loss
        with torch.no_grad():
            dense_logits, dense_states = called(self.teacher, windows, distillation.distill == "squarehead")
        if distillation.distill == "logits":
            apart = soft_divergence(dense_logits, logits, distillation.temperature).sum()
        else:
            apart = torch.stack([square_head(*pair).sum() for pair in zip(dense_states, states, strict=True)]).sum()
        return distillation.task_weight * loss + distillation.distill_weight * apart


def differentiated(
    model: nn.Module,
    windows: Windows,
    micro_batch: int,
    losses_of: Callable[[Windows], Iterable[tuple[Float[Tensor, ""], Sequence[nn.Parameter] | None]]],
) -> tuple[float, float]:
    """See `tuner.Objective`: the sum of the losses of all parts of the windows, with what learns from each; None: all.
    The multiple is 1, but in fp16, where a number's part of the gradient is too small."""
    is_half = next(model.parameters()).dtype is torch.float16
    multiple = float(2 ** math.floor(math.log2(windows.numel()))) if is_half else 1.0
    total = torch.zeros((), dtype=torch.float64)
    for part in distributed.own_samples(windows).split(micro_batch):
        if len(part):
            for loss, learning in losses_of(part):
                (loss * multiple).backward(inputs=learning)
                total = total + loss.detach().double()
    return float(distributed.all_sum(total.cpu())), multiple


def called(model: Any, windows: Windows, with_states: bool) -> tuple[Logits, tuple[Tensor, ...]]:
    """Logits, and the hidden state after each block where that is asked for."""
    ids = sequences(windows).to(next(model.parameters()).device, non_blocking=True)
    output = model(input_ids=ids, use_cache=False, output_hidden_states=with_states)
    return output.logits, tuple(output.hidden_states[1:]) if with_states else ()  # the first enters block 0


def soft_divergence(dense: Logits, found: Logits, temperature: float) -> Float[Tensor, " sample"]:
    """T^2 KL(p^(1/T) || q^(1/T)), the mean over the tokens of each window."""
    return divergence(dense.float() / temperature, found.float() / temperature).mean(dim=1) * temperature**2


def square_head(
    dense: Float[Tensor, "sample seq hidden"], found: Float[Tensor, "sample seq hidden"]
) -> Float[Tensor, " sample"]:
    """sum (h* - h)^2 / sum h*^2 of each window."""
    dense = dense.to(found.device).float()
    size = dense.square().sum(dim=(1, 2)).clamp(min=SMALLEST)
    return (dense - found.float()).square().sum(dim=(1, 2)) / size


def sequences(windows: Windows) -> Int[Tensor, "sequence _seq"]:
    """What passes the model: windows as they are; each option of examples (`texts.tasks.Options`), up to the last token
    that counts."""
    if windows.dim() == 2:
        return windows
    rows = windows.flatten(0, 1)
    rows = rows[:, : int((rows < 0).any(dim=0).nonzero().max()) + 1]
    return torch.where(rows < 0, ~rows, rows)


def num_tokens(windows: Windows) -> int:
    """That pass the model: those of windows; of examples each option's and its prompt's, without what fills rows up."""
    if windows.dim() == 2:
        return windows.numel()
    places = torch.arange(1, windows.shape[-1] + 1)
    return int(torch.where(windows < 0, places, 0).amax(dim=-1).sum())


def option_scores(logits: Logits, examples: Options) -> Float[Tensor, "_example option"]:
    """The mean log-probability of the tokens of each option, in fp32."""
    rows = examples.flatten(0, 1)[:, 1 : logits.shape[1]]
    own = rows < 0
    found = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), torch.where(own, ~rows, rows).flatten(), reduction="none"
    )
    return -((found.view_as(rows) * own).sum(dim=1) / own.sum(dim=1)).view(examples.shape[:2])


def option_losses(logits: Logits, examples: Options) -> Float[Tensor, " _example"]:
    """-log softmax over the options of their scores, at the right one."""
    return -option_scores(logits, examples).log_softmax(dim=1)[:, 0]


def answer_losses(logits: Logits, examples: Options) -> Float[Tensor, " _example"]:
    """The mean over the right option's tokens of -log q(token)."""
    return -option_scores(logits, examples)[:, 0]


def option_errors(logits: Logits, examples: Options) -> Float[Tensor, " _example"]:
    """0 where the right option has the greatest score by itself, else 1, as where scores are no numbers: their mean is
    1 - accuracy."""
    scores = option_scores(logits, examples)
    return 1 - (scores[:, 0] > scores[:, 1:].amax(dim=1)).float()


TASK_LOSSES: Mapping[str, Losses] = {"options": option_losses, "answer": answer_losses, "accuracy": option_errors}
"""By `recovery.task_loss`: MeZO's two losses (arXiv 2305.17333), and what has no gradient. `answer` is the mean over a
batch's tokens in MeZO's code, here over the tokens of each example and then over examples: alike where answers are of
one length."""


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Blocks keep their inputs alone for the way back. Not transformers' own, which works in training mode only: there
    dropout would be on."""
    modules = discover_blocks(model)[1]
    forwards = [
        partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False) for module in modules
    ]
    with replaced_forwards(modules, forwards):
        yield


@torch.no_grad()
def mean_loss(model: nn.Module, windows: Windows, batch_size: int, losses: Losses = next_token_losses) -> float:
    """The mean loss of the windows, in fp64 over fp32 losses of each."""
    total = torch.zeros((), dtype=torch.float64)
    for part in distributed.own_samples(windows).split(batch_size):
        if len(part):
            logits, _ = called(model, part, False)
            total = total + losses(logits, part.to(logits.device, non_blocking=True)).double().sum()
    return float(distributed.all_sum(total.cpu())) / len(windows)
