"""The Python API of recovery: a model object is tuned in place under its own zeros."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa_exp.blocks.reports import RecoveryReport
from besa_exp.checkpoints.load import check_finite_weights, model_context, vocabulary_size
from besa_exp.errors import ConfigurationError
from besa_exp.presets import preset
from besa_exp.recovery.keep_bits import keep_of_zeros, sparsity_of
from besa_exp.recovery.parts import parts_of, report_of
from besa_exp.recovery.recipe import check_fit, check_recovery, method_of, objective_of, plan_of
from besa_exp.recovery.tuning import Point
from besa_exp.recovery.tuning import tune as tune_model
from besa_exp.rules import check_fields
from besa_exp.runs.as_a_run import as_a_run
from besa_exp.runs.model_object import check_model
from besa_exp.runs.python_request import SEQ_LEN, Texts, given_texts, plain
from besa_exp.settings import RecoverySettings


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts_or_tokens: Texts = "embedded",
    *,
    recovery: str | RecoverySettings = "full",
    dense: bool = False,
    teacher: PreTrainedModel | None = None,
    seed: int = 0,
    on_step: Callable[[Point], None] = lambda point: None,
) -> RecoveryReport:
    """Tune a model object in place. Its zeros stay zero, and the state with the least held-out loss is kept.

    `texts_or_tokens`: the name of a set, a path of a text or token file, a list of texts, or token ids [sample seq].
    `recovery`: the name of a preset (`besa list recovery`) or a changed one, such as
    `replace(besa_exp.preset("recovery", "lora"), steps=500)`; an object's own seed counts, else `seed`. `teacher`: the
    dense model, which `recovery="blocks"` and `distill` follow. `dense`: also tune a model without zeros. `on_step` is
    called with each step: its `step`, `loss` (nats a token), `gradient_norm` and, where it was judged, `held_out`.

    The report has `loss_before` and `loss_after` of the held-out windows: mean cross-entropy a token, in nats.

    ConfigurationError (a ValueError): the request cannot be carried out; it names all problems."""
    given = given_texts(texts_or_tokens)
    problems = check_model(model)
    if not isinstance(teacher, PreTrainedModel | None):
        problems.append(f"teacher={type(teacher).__name__}: give the dense model as an object")
    if problems:
        raise ConfigurationError(*problems)
    asked = preset("recovery", recovery, seed=plain(seed)) if isinstance(recovery, str) else recovery
    check_fields(asked, "" if isinstance(recovery, str) else "recovery")  # of a preset only `seed` can be wrong
    context = model_context(model)
    asked = replace(asked, seq_len=asked.seq_len or min(SEQ_LEN, context))
    keep = keep_of_zeros(model)
    problems = check_recovery(asked, sparsity_of(model, keep), "unstructured", context)
    if not (keep or dense):
        problems.append("the model has no zeros, so that nothing would be kept; prune it first, or give dense=True")
    if problems := problems or check_fit(asked, model):
        raise ConfigurationError(*problems)
    method = method_of(asked)
    with as_a_run(model, asked.seed), tempfile.TemporaryDirectory(prefix="besa-") as folder:
        check_finite_weights(model, type(model).__name__)
        file = Path(folder) / "tokens.safetensors"
        parts = parts_of(asked, given, file, tokenizer, vocabulary_size(model))
        objective = objective_of(asked, method, model, teacher)
        before = parts.accuracy(model, asked.windows_together)
        found, _ = tune_model(model, keep, method, objective, parts, plan_of(asked), on_point=on_step)
        return report_of(asked, found, parts, before, parts.accuracy(model, asked.windows_together))
