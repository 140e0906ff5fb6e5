"""Scores of a model: perplexity on text or token files, and zero-shot accuracy through lm-eval.

Every set and task stands alone: one that cannot be had is recorded with its reason and the rest is kept. lm-eval and
datasets are imported only when a task is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from besa_exp.errors import ConfigurationError, Unavailable
from besa_exp.evaluation.checks import perplexity_window
from besa_exp.evaluation.perplexity import Perplexity, cut_windows, perplexity
from besa_exp.settings import EvaluatorSettings
from besa_exp.text_sources import is_token_file, read_text
from besa_exp.tokens import (
    Tokenizer,
    begins_with_bos,
    read_token_file,
    special_tokens_record,
    token_stream,
    tokens_sha256,
)


@dataclass(frozen=True)
class Scores:
    """`perplexity` {set: value, None where it is not to be had}, `zero_shot` {task: {lm-eval's metric: value}},
    `unavailable` {set or task: reason}, and in `provenance` what makes two scores comparable."""

    perplexity: dict[str, float | None]
    zero_shot: dict[str, dict[str, float]]
    unavailable: dict[str, str]
    provenance: dict[str, Any]


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    settings: EvaluatorSettings,
    offline: bool,
    seed: int,
    on_progress: Callable[[str], None],
) -> Scores:
    """Score `model` on every set and task that `settings` names. `on_progress` is told what comes next.

    The global random states, the tokenizer and the weights are left as they were.
    """
    scores = Scores({}, {}, {}, {"perplexity": {}, "zero_shot": {}})
    for source in settings.perplexity_sets:
        on_progress(f"perplexity on {source}")
        try:
            result, record = _score_set(model, tokenizer, source, settings, offline)
        except Unavailable as error:
            scores.perplexity[source] = None
            scores.unavailable[source] = str(error)
        else:
            scores.perplexity[source] = result.value
            scores.provenance["perplexity"][source] = record
    if settings.tasks:
        _score_tasks(model, tokenizer, settings, offline, seed, on_progress, scores)
    return scores


def _score_set(
    model: Any, tokenizer: Tokenizer | None, source: str, settings: EvaluatorSettings, offline: bool
) -> tuple[Perplexity, dict[str, Any]]:
    """Perplexity of one set and its record. Raises Unavailable with the reason where there is none."""
    context = _context(model)
    window = perplexity_window(settings, context)
    windows, record = _windows_of(source, tokenizer, window, offline)
    if windows.shape[1] > context:
        raise Unavailable(f"its windows of {windows.shape[1]} tokens exceed the model's context of {context}")
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(windows.max()) >= vocabulary:
        raise Unavailable(f"token id {int(windows.max())} is not in the model's vocabulary of {vocabulary}")
    result = perplexity(model, windows, window, settings.batch_size)
    if not math.isfinite(result.value):
        raise Unavailable(f"the perplexity is not a finite number ({result.value}): the model's logits are broken")
    counts = {
        "num_tokens": result.num_tokens,
        "num_windows": result.num_windows,
        "batch_size": result.batch_size,
        "seq_len": result.seq_len,
        "tokens_sha256": tokens_sha256(windows),
    }
    return result, record | counts


def _windows_of(
    source: str, tokenizer: Tokenizer | None, window: int, offline: bool
) -> tuple[Int[Tensor, "window seq"], dict[str, Any]]:
    """A set's windows and its record."""
    try:
        if is_token_file(source):
            tokens, record, max_windows = read_token_file(Path(source).expanduser()), {"file": source}, None
        elif tokenizer is None:
            raise Unavailable("the model has no tokenizer; text needs one (a .safetensors file of input_ids does not)")
        else:
            text = read_text(source, "perplexity", offline)
            tokens, max_windows = token_stream(tokenizer, text.documents), text.max_windows
            record = text.provenance | special_tokens_record(tokenizer, text.documents)
    except ConfigurationError as error:
        raise Unavailable(str(error)) from error
    windows = tokens if tokens.ndim == 2 else cut_windows(tokens, window)[:max_windows]
    if len(windows) == 0:
        raise Unavailable(
            f"too little text: {len(tokens)} tokens do not fill one window of {window}; lower evaluator.seq_len"
        )
    return windows, record


def _score_tasks(
    model: Any,
    tokenizer: Any,
    settings: EvaluatorSettings,
    offline: bool,
    seed: int,
    on_progress: Callable[[str], None],
    scores: Scores,
) -> None:
    on_progress("loading lm-eval")
    if reason := _no_tasks(tokenizer):
        scores.unavailable.update(dict.fromkeys(settings.tasks, reason))
        return
    from besa_exp.evaluation.zero_shot import harness, score_task

    scored = harness(model, tokenizer, settings.batch_size, _context(model))
    scores.provenance["zero_shot"] = _tasks_record(model, tokenizer, settings, seed)
    for task in settings.tasks:
        on_progress(f"zero-shot {task}")
        try:
            score = score_task(task, scored, settings, offline, seed)
        except Unavailable as error:
            scores.unavailable[task] = str(error)
        else:
            scores.zero_shot[task] = score.metrics
            scores.provenance["zero_shot"]["tasks"][task] = score.provenance


def _no_tasks(tokenizer: Any) -> str | None:
    """Why no zero-shot task can be scored; None: nothing speaks against it. lm-eval is loaded."""
    if tokenizer is None:
        return "the model has no tokenizer; a zero-shot task needs one"
    try:
        import besa_exp.evaluation.zero_shot  # noqa: F401
    except ImportError as error:
        return f"lm-eval cannot be imported ({error}); pip install 'lm-eval[hf]>=0.4.13'"
    return None


def _tasks_record(model: Any, tokenizer: Any, settings: EvaluatorSettings, seed: int) -> dict[str, Any]:
    """What all tasks have in common."""
    import lm_eval

    return {
        "lm_eval": lm_eval.__version__,
        "batch_size": settings.batch_size,
        "limit": settings.limit,
        "seed": seed,
        "max_length": _context(model),
        "tokenizer_adds_bos": begins_with_bos(tokenizer),
        "tasks": {},
    }


def _context(model: Any) -> int:
    from besa_exp.models import model_context

    return model_context(model)
