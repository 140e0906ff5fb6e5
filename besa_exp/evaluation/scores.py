"""Scores of a model: perplexity on text or token files, and zero-shot accuracy through lm-eval.

Every set and task stands alone: one that cannot be loaded is recorded with its reason and the rest is kept. lm-eval and
datasets are imported only when a task is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from besa_exp.errors import Unavailable, as_unavailable
from besa_exp.evaluation.checks import perplexity_window, prompts_of
from besa_exp.evaluation.cost import counts_of, speeds_of
from besa_exp.evaluation.kept_scores import FinishedScores
from besa_exp.evaluation.perplexity import OnCount, cut_windows, perplexity, uncounted
from besa_exp.evaluation.policies import Decided, Skipping, decide
from besa_exp.evaluation.score import Score, Scores, perplexity_score, task_scores
from besa_exp.evaluation.simulated_speed import simulate_model
from besa_exp.evaluation.speed import measure_model
from besa_exp.evaluation.task_definitions import scored_names
from besa_exp.machine import distributed
from besa_exp.settings import EvaluatorSettings
from besa_exp.texts.sources import COLUMN, file_sha256, is_token_file, read_text
from besa_exp.texts.tokens import (
    Tokenizer,
    begins_with_bos,
    read_token_file,
    special_tokens_record,
    token_stream,
    tokens_sha256,
)

if TYPE_CHECKING:
    from besa_exp.checkpoints.load import LoadedModel

TOKENS_OF_TEXT = 24  # after each prompt
PADDING = 0  # lm-eval fills its batches with it, on the right, and gives no mask


def evaluate(
    loaded: LoadedModel,
    settings: EvaluatorSettings,
    offline: bool,
    seed: int,
    on_progress: Callable[[str], None],
    finished: FinishedScores | None = None,
    on_count: OnCount = uncounted,
    skipping: Skipping | None = None,
) -> Scores:
    """Score a model on every set and task that `settings` names. `on_progress` is given what comes next, `on_count` how
    far that is; what `finished` holds is taken from there. Under `skipping` the model skips what that says, decided
    again for each model.

    The global random states, the tokenizer and the weights are left as they were.
    """
    unavailable: dict[str, str] = {}
    scores: list[Score] = []
    common: Mapping[str, Any] = {}
    try:
        decided = _decided(loaded, settings, skipping, on_progress)
    except Unavailable as error:
        unavailable |= dict.fromkeys([*settings.perplexity_sets, *scored_names(settings)], str(error))
        scores += [perplexity_score(name, None, {}) for name in settings.perplexity_sets]
    else:
        if finished and skipping:
            finished = replace(finished, given={**finished.given, "skipping": skipping.request})
        scores += _score_sets(loaded, settings, offline, on_progress, unavailable, finished, on_count, decided)
        if settings.tasks:
            common, of_tasks = _score_tasks(
                loaded, settings, offline, seed, on_progress, unavailable, finished, on_count, decided
            )
            scores += of_tasks
    texts = {} if skipping else _texts(loaded, settings, on_progress, unavailable)
    speeds = _speeds(loaded, settings, on_progress, unavailable)
    return Scores(tuple(scores), unavailable, common, texts=texts, **speeds)


def _decided(
    loaded: LoadedModel, settings: EvaluatorSettings, skipping: Skipping | None, on_progress: Callable[[str], None]
) -> Decided | None:
    """What this model skips; None: nothing, or there is nothing to score. Unavailable: it cannot skip."""
    if skipping is None or not (settings.perplexity_sets or settings.tasks):
        return None
    on_progress(f"what skipping={skipping.settings.name} skips")
    with as_unavailable():
        decided = decide(loaded, skipping)
    if decided.found:
        on_progress(", ".join(f"skipping: {key} {value}" for key, value in decided.found.items()))
    return decided


@contextmanager
def _recorded(
    loaded: LoadedModel, decided: Decided | None, record: dict[str, Any], padding: int | None = None
) -> Iterator[None]:
    """Under the policy, if there is one; `record` then says which, and what it skipped."""
    if decided is None:
        yield
        return
    with decided.on(loaded.model, padding) as course:
        yield
    record["skipping"] = decided.record(course)


def _score_sets(
    loaded: LoadedModel,
    settings: EvaluatorSettings,
    offline: bool,
    on_progress: Callable[[str], None],
    unavailable: dict[str, str],
    finished: FinishedScores | None,
    on_count: OnCount,
    decided: Decided | None,
) -> list[Score]:
    """The perplexities; `unavailable` receives the reason for each that is None."""
    scores = []
    for source in settings.perplexity_sets:
        request = {"seq_len": settings.seq_len, "column": settings.column}
        request |= {"max_windows": settings.max_windows} if settings.max_windows else {}
        earlier = finished.find("perplexity", source, request) if finished else None
        on_progress(f"perplexity on {source}" + (", scored before" if earlier else ""))
        try:
            with as_unavailable():
                value, record = earlier or _score_set(loaded, source, settings, offline, on_count, decided)
        except Unavailable as error:
            unavailable[source] = str(error)
            scores.append(perplexity_score(source, None, {}))
        else:
            scores.append(perplexity_score(source, value, record))
            if finished and not earlier:
                finished.keep("perplexity", source, request, (value, record))
    return scores


def _texts(
    loaded: LoadedModel,
    settings: EvaluatorSettings,
    on_progress: Callable[[str], None],
    unavailable: dict[str, str],
) -> dict[str, str]:
    """What the model says after each prompt. A model that cannot is n/a where the prompts were asked for, not where
    they came by themselves."""
    prompts = prompts_of(settings)
    if not prompts:
        return {}
    lacks = "the model has no tokenizer" if loaded.tokenizer is None else ""
    lacks = "a streamed model would be read again for every token" if loaded.weights is not None else lacks
    on_progress("text samples" + (f": none, {lacks}" if lacks else ""))
    try:
        with as_unavailable():
            if lacks:
                raise Unavailable(lacks)
            from besa_exp.evaluation.continuations import continuations

            said = distributed.from_first(
                lambda: continuations(loaded.model, loaded.tokenizer, prompts, TOKENS_OF_TEXT)
            )
            return dict(zip(prompts, said, strict=True))
    except Unavailable as error:
        unavailable |= {"text samples": str(error)} if settings.prompts or not lacks else {}
        return {}


def _speeds(
    loaded: LoadedModel,
    settings: EvaluatorSettings,
    on_progress: Callable[[str], None],
    unavailable: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """Simulated and measured speed where they are asked for; cost, which is counted always."""
    context = _context(loaded.model)
    parts: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
        ("cost", "", lambda: counts_of(loaded.model, context))
    ]
    if settings.simulated_speed:
        parts.append(("simulated_speed", "simulated speed", lambda: simulate_model(loaded)))
    if settings.speed:
        parts.append(("speed", "speed of 2:4 products", lambda: measure_model(loaded)))
        on_first = partial(distributed.from_first, lambda: speeds_of(loaded, context))
        parts.append(("cost", "cost: prefill and decoding", on_first))
    found: dict[str, dict[str, Any]] = {}
    for part, doing, measure in parts:
        if doing:
            on_progress(doing)
        try:
            with as_unavailable():
                found[part] = found.get(part, {}) | measure()
        except Unavailable as error:
            unavailable[part.replace("_", " ")] = str(error)
            found |= {"speed": {"unavailable": str(error)}} if part == "speed" else {}
    return found


def _score_set(
    loaded: LoadedModel,
    source: str,
    settings: EvaluatorSettings,
    offline: bool,
    on_count: OnCount,
    decided: Decided | None,
) -> tuple[float, dict[str, Any]]:
    """Perplexity of one set and its record. Raises Unavailable with the reason where there is none."""
    model: Any = loaded.model
    context = _context(model)
    window = perplexity_window(settings, context)
    windows, record = distributed.from_first(
        lambda: windows_of(source, loaded.tokenizer, window, offline, settings.column, settings.max_windows)
    )
    if windows.shape[1] < 2:
        raise Unavailable("its windows have one token each: nothing is predicted; give windows of two tokens or more")
    if windows.shape[1] > context:
        raise Unavailable(f"its windows of {windows.shape[1]} tokens exceed the model's context of {context}")
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(windows.max()) >= vocabulary:
        raise Unavailable(f"token id {int(windows.max())} is not in the model's vocabulary of {vocabulary}")
    if loaded.weights is None:
        with _recorded(loaded, decided, record):
            result = perplexity(model, windows, window, settings.batch_size, on_count)
    else:
        from besa_exp.evaluation.streamed import streamed_perplexity

        result = streamed_perplexity(model, loaded.weights, windows, settings.batch_size, on_count)
    if not math.isfinite(result.value):
        raise Unavailable(
            f"the perplexity is not a finite number ({result.value}): the losses are beyond 709 nats a token"
        )
    counts = {
        "num_tokens": result.num_tokens,
        "num_windows": result.num_windows,
        "batch_size": result.batch_size,
        "seq_len": result.seq_len,
        "tokens_sha256": tokens_sha256(windows),
    }
    return result.value, record | counts


def windows_of(
    source: str,
    tokenizer: Tokenizer | None,
    window: int,
    offline: bool,
    column: str = COLUMN,
    most: int | None = None,
) -> tuple[Int[Tensor, "window seq"], dict[str, Any]]:
    """A set's windows, the first `most` where that is given, and its record. Unavailable: whatever speaks against
    it."""
    with as_unavailable():
        if is_token_file(source):
            path = Path(source).expanduser()
            tokens, max_windows = read_token_file(path), None
            record = {"file": source, "file_sha256": file_sha256(path)}
        elif tokenizer is None:
            raise Unavailable("the model has no tokenizer; text needs one (a .safetensors file of input_ids does not)")
        else:
            text = read_text(source, "perplexity", offline, column)
            tokens, max_windows = token_stream(tokenizer, text.documents), text.max_windows
            record = text.provenance | special_tokens_record(tokenizer, text.documents)
    windows = tokens if tokens.ndim == 2 else cut_windows(tokens, window)[:max_windows]
    if len(windows) == 0:
        raise Unavailable(
            f"too little text: {len(tokens)} tokens do not fill one window of {window}; lower evaluator.seq_len"
        )
    cut = {"max_windows": most, "windows": len(windows)} if most and most < len(windows) else {}
    return windows[:most], record | cut


def _score_tasks(
    loaded: LoadedModel,
    settings: EvaluatorSettings,
    offline: bool,
    seed: int,
    on_progress: Callable[[str], None],
    unavailable: dict[str, str],
    finished: FinishedScores | None,
    on_count: OnCount,
    decided: Decided | None,
) -> tuple[Mapping[str, Any], list[Score]]:
    """What all tasks have in common, and their scores; `unavailable` receives the reason for each that has none."""
    on_progress("loading lm-eval")
    tasks, scores = list(scored_names(settings)), []
    try:
        with as_unavailable():
            scored = _harness(loaded, settings)
            scored.on_count = on_count
            common = _tasks_record(loaded.model, loaded.tokenizer, settings, seed)
    except Unavailable as error:
        unavailable.update(dict.fromkeys(tasks, str(error)))
        return {}, []
    from besa_exp.evaluation.zero_shot import score_task

    keys = ("limit", "num_fewshot", "include_path")
    request = {key: getattr(settings, key) for key in keys} | {"seed": seed, "data": settings.data_dir}
    for task in tasks:
        earlier = finished.find("zero_shot", task, request) if finished else None
        on_progress(f"zero-shot {task}" + (", scored before" if earlier else ""))
        try:
            with as_unavailable():
                under: dict[str, Any] = {}
                with _recorded(loaded, None if earlier else decided, under, PADDING):
                    metrics, record = earlier or astuple(score_task(task, scored, settings, offline, seed))
                record = {**record, **under}
        except Unavailable as error:
            unavailable[task] = str(error)
            continue
        scores += task_scores(task, metrics, record)
        if finished and not earlier:
            finished.keep("zero_shot", task, request, (metrics, record))
    return common, scores


def _harness(loaded: LoadedModel, settings: EvaluatorSettings) -> Any:
    """The model as lm-eval scores it. Unavailable: why no task can be scored."""
    if loaded.tokenizer is None:
        raise Unavailable("the model has no tokenizer; a zero-shot task needs one")
    try:
        from besa_exp.evaluation.zero_shot import harness
    except ImportError as error:
        raise Unavailable(f"lm-eval cannot be imported ({error}); pip install 'lm-eval[hf]>=0.4.13'") from error
    return harness(loaded.model, loaded.tokenizer, settings.batch_size, _context(loaded.model), loaded.weights)


def callable_model(loaded: LoadedModel) -> AbstractContextManager[None]:
    """The model as a whole can be called for as long as this lasts."""
    return loaded.weights.on_demand(loaded.model) if loaded.weights else nullcontext()


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
    }


def _context(model: Any) -> int:
    from besa_exp.checkpoints.load import model_context  # it imports transformers

    return model_context(model)
