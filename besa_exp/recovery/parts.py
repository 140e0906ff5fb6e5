"""What a recovery learns from, what chooses its best state, and what of a task is scored before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from besa_exp.blocks.reports import RecoveryReport
from besa_exp.machine import distributed
from besa_exp.recovery.objective import TASK_LOSSES
from besa_exp.recovery.recipe import method_of, step_size, steps_of
from besa_exp.recovery.tuning import Parts, Recovery
from besa_exp.settings import RecoverySettings
from besa_exp.texts.sources import COLUMN
from besa_exp.texts.tasks import read_examples
from besa_exp.texts.token_stream import TokenStream
from besa_exp.texts.tokens import Tokenizer, tokens_sha256
from besa_exp.texts.tuning_text import tuning_tokens


def parts_of(
    asked: RecoverySettings,
    source: str | Sequence[str] | Tensor,
    path: Path,
    tokenizer: Tokenizer | None,
    vocabulary: int,
    offline: bool = False,
    column: str = COLUMN,
) -> Parts:
    """Of the task, or of the text `source` and its `column` where recovery.path names no other; its tokens lie in the
    file `path`. ConfigurationError: it cannot be read, or does not suffice."""
    assert asked.seq_len is not None
    seq_len = asked.seq_len
    if asked.task is not None:
        sizes = asked.shots, asked.held_out, asked.tested
        found = read_examples(asked.task, asked.path, tokenizer, seq_len, sizes, asked.seed, offline)
        learned = found.learned[:, :1] if asked.task_loss == "answer" else found.learned
        sha256 = tokens_sha256(torch.cat([found.learned, found.held_out]))
        return Parts(learned, found.held_out, TASK_LOSSES[asked.task_loss], sha256, found.tested)

    def read() -> TokenStream:
        return tuning_tokens(
            asked.path or source,
            path,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            most=(steps_of(asked) * asked.batch_size + asked.held_out) * seq_len,
            seed=asked.seed,
            offline=offline,
            column=asked.column if asked.path else column,
        )

    if distributed.is_first():
        read()
    distributed.barrier()
    stream = read()
    learned, held_out = stream.windows(seq_len).split(asked.held_out)
    return Parts(learned, held_out.all(), sha256=stream.sha256)


def report_of(
    asked: RecoverySettings, found: Recovery, parts: Parts, before: float | None, after: float | None
) -> RecoveryReport:
    """What became of it, with a task's accuracies."""
    return RecoveryReport(
        method=asked.name,
        loss_before=found.before,
        loss_after=found.after,
        steps=len(found.points),
        best_step=found.best_step,
        tokens=sum(point.tokens for point in found.points),
        stopped=found.stopped,
        lr=step_size(method_of(asked)) * found.factor,
        task=None
        if parts.tested is None
        else {"name": asked.task, "examples": len(parts.tested), "accuracy": {"before": before, "after": after}},
    )
