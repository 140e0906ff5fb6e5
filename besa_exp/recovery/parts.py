"""What a recovery learns from, what chooses its best state, and what of a task is scored before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from besa_exp.blocks.reports import RecoveryReport
from besa_exp.errors import ConfigurationError
from besa_exp.machine import distributed
from besa_exp.recovery.objective import mean_loss, option_errors
from besa_exp.recovery.recipe import method_of, step_size, steps_of
from besa_exp.recovery.tuner import Windows
from besa_exp.recovery.tuning import Recovery, Text
from besa_exp.settings import RecoverySettings
from besa_exp.texts.sources import COLUMN
from besa_exp.texts.tasks import Options, read_examples
from besa_exp.texts.token_stream import TokenStream
from besa_exp.texts.tokens import Tokenizer, tokens_sha256
from besa_exp.texts.tuning_text import tuning_tokens


@dataclass(frozen=True)
class Parts:
    """`tested`: the examples of a task that are scored; None: it is text. `sha256` is of all that is learned from."""

    learned: Text
    held_out: Windows
    sha256: str
    tested: Options | None = None

    def accuracy(self, model: nn.Module, batch_size: int) -> float | None:
        """The share of the tested examples whose right option has the greatest score; None: it is text."""
        return None if self.tested is None else 1 - mean_loss(model, self.tested, batch_size, option_errors)


def parts_of(
    asked: RecoverySettings,
    seq_len: int,
    source: str | Sequence[str] | Int[Tensor, "sample seq"],
    path: Path,
    tokenizer: Tokenizer | None,
    vocabulary: int,
    offline: bool = False,
    column: str = COLUMN,
) -> Parts:
    """Of the task, or of the text `source` and its `column` where recovery.path names no other; its tokens lie in the
    file `path`. ConfigurationError: it cannot be read, or does not suffice."""
    if asked.task is not None:
        sizes = asked.shots, asked.held_out, asked.tested
        found = read_examples(asked.task, asked.path, tokenizer, seq_len, sizes, asked.seed, offline)
        learned = found.learned[:, :1] if asked.task_loss == "answer" else found.learned
        return Parts(learned, found.held_out, tokens_sha256(torch.cat([found.learned, found.held_out])), found.tested)

    def read() -> TokenStream:
        return tuning_tokens(
            asked.path or source,
            path,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            most=(steps_of(asked, seq_len) * asked.batch_size + asked.held_out) * seq_len,
            seed=asked.seed,
            offline=offline,
            column=asked.column if asked.path else column,
        )

    if distributed.is_first():
        read()
    distributed.barrier()
    stream = read()
    try:
        learned, held_out = stream.windows(seq_len).split(asked.held_out)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    return Parts(learned, held_out.all(), stream.sha256)


def report_of(
    asked: RecoverySettings, found: Recovery, parts: Parts, before: float | None, after: float | None
) -> RecoveryReport:
    """What became of it, with a task's accuracies."""
    lr = step_size(method_of(asked, len(found.points))) * found.factor
    return RecoveryReport(
        method=asked.name,
        loss_before=found.before,
        loss_after=found.after,
        steps=len(found.points),
        best_step=found.best_step,
        tokens=sum(point.tokens for point in found.points),
        stopped=found.stopped,
        lr=lr,
        task=None
        if parts.tested is None
        else {"name": asked.task, "examples": len(parts.tested), "accuracy": {"before": before, "after": after}},
    )
