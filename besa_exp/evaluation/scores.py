"""Scores of a model: perplexity on text or token files, and zero-shot accuracy through lm-eval.

Every set and task stands alone: one that cannot be loaded is recorded with its reason and the rest is kept. lm-eval and
datasets are imported only when a task is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from besa_exp.errors import Unavailable, as_unavailable
from besa_exp.evaluation.checks import perplexity_window, prompts_of
from besa_exp.evaluation.cost import counts_of, measure_model, speeds_of
from besa_exp.evaluation.kept_scores import FinishedScores
from besa_exp.evaluation.perplexity import OnCount, cut_windows, perplexity, uncounted
from besa_exp.evaluation.policies import Decided, Skipping, decide
from besa_exp.evaluation.score import Score, Scores, perplexity_score, task_scores
from besa_exp.evaluation.simulated_speed import simulate_model
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
    if finished and skipping:
        finished = replace(finished, given={**finished.given, "skipping": skipping.request})
    asked = _Asked(loaded, settings, offline, seed, on_progress, on_count, finished=finished)
    with asked.noting(*settings.perplexity_sets, *scored_names(settings)):
        asked = replace(asked, decided=_decided(asked, skipping))
    common: Mapping[str, Any] = {}
    if asked.unavailable:
        scores = [perplexity_score(name, None, {}) for name in settings.perplexity_sets]
    else:
        scores = _score_sets(asked)
        if settings.tasks:
            common, of_tasks = _score_tasks(asked)
            scores += of_tasks
    texts = {} if skipping else _texts(asked)
    return Scores(tuple(scores), asked.unavailable, common, texts=texts, **_speeds(asked))


@dataclass(frozen=True)
class _Asked:
    """What is asked, and of which model. `unavailable` receives the reason for each score that is None; `decided`: what
    the model skips."""

    loaded: LoadedModel
    settings: EvaluatorSettings
    offline: bool
    seed: int
    on_progress: Callable[[str], None]
    on_count: OnCount
    unavailable: dict[str, str] = field(default_factory=dict)
    finished: FinishedScores | None = None
    decided: Decided | None = None

    @property
    def context(self) -> int:
        """The longest window that the model takes."""
        from besa_exp.checkpoints.load import model_context  # it imports transformers

        return model_context(self.loaded.model)

    @contextmanager
    def noting(self, *names: str) -> Iterator[None]:
        """What raises inside is left there, and its reason is why these are not available."""
        try:
            with as_unavailable():
                yield
        except Unavailable as error:
            self.unavailable.update(dict.fromkeys(names, str(error)))

    def measured(
        self, kind: str, name: str, request: dict[str, Any], measure: Callable[[_Asked, str], tuple[Any, Any]]
    ) -> tuple[Any, Any] | None:
        """What `measure` gives of a set or task and its record, or gave before under the same `request`. None: it is
        not available."""
        earlier = self.finished.find(kind, name, request) if self.finished else None
        doing = "perplexity on" if kind == "perplexity" else "zero-shot"
        self.on_progress(f"{doing} {name}" + (", scored before" if earlier else ""))
        if earlier:
            return earlier[0], earlier[1]
        found = None
        with self.noting(name):
            found = measure(self, name)
        if found and self.finished:
            self.finished.keep(kind, name, request, found)
        return found


def _decided(asked: _Asked, skipping: Skipping | None) -> Decided | None:
    """What this model skips; None: nothing, or there is nothing to score. Unavailable: it cannot skip."""
    if skipping is None or not (asked.settings.perplexity_sets or asked.settings.tasks):
        return None
    asked.on_progress(f"what skipping={skipping.settings.name} skips")
    decided = decide(asked.loaded, skipping)
    if decided.found:
        asked.on_progress(", ".join(f"skipping: {key} {value}" for key, value in decided.found.items()))
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


def _score_sets(asked: _Asked) -> list[Score]:
    settings, scores = asked.settings, []
    request: dict[str, Any] = {"seq_len": settings.seq_len, "column": settings.column}
    request |= {"max_windows": settings.max_windows} if settings.max_windows else {}
    for source in settings.perplexity_sets:
        found = asked.measured("perplexity", source, request, _score_set)
        scores.append(perplexity_score(source, *(found or (None, {}))))
    return scores


def _texts(asked: _Asked) -> dict[str, str]:
    """What the model says after each prompt. A model that cannot is n/a where the prompts were asked for, not where
    they came by themselves."""
    loaded, prompts = asked.loaded, prompts_of(asked.settings)
    if not prompts:
        return {}
    lacks = "the model has no tokenizer" if loaded.tokenizer is None else ""
    lacks = "a streamed model would be read again for every token" if loaded.weights is not None else lacks
    asked.on_progress("text samples" + (f": none, {lacks}" if lacks else ""))
    with asked.noting(*(["text samples"] if asked.settings.prompts or not lacks else [])):
        if lacks:
            raise Unavailable(lacks)
        from besa_exp.evaluation.continuations import continuations

        said = distributed.from_first(lambda: continuations(loaded.model, loaded.tokenizer, prompts, TOKENS_OF_TEXT))
        return dict(zip(prompts, said, strict=True))
    return {}


def _speeds(asked: _Asked) -> dict[str, dict[str, Any]]:
    """Simulated and measured speed where they are asked for; cost, which is counted always."""
    loaded, settings, context = asked.loaded, asked.settings, asked.context
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
            asked.on_progress(doing)
        with asked.noting(part.replace("_", " ")):
            found[part] = found.get(part, {}) | measure()
    return ({"speed": {"unavailable": asked.unavailable["speed"]}} if "speed" in asked.unavailable else {}) | found


def _score_set(asked: _Asked, source: str) -> tuple[float, dict[str, Any]]:
    """Perplexity of one set and its record. Raises Unavailable with the reason where there is none."""
    loaded, settings, context = asked.loaded, asked.settings, asked.context
    model: Any = loaded.model
    window = perplexity_window(settings, context)
    windows, record = distributed.from_first(
        lambda: windows_of(source, loaded.tokenizer, window, asked.offline, settings.column, settings.max_windows)
    )
    if windows.shape[1] < 2:
        raise Unavailable("its windows have one token each: nothing is predicted; give windows of two tokens or more")
    if windows.shape[1] > context:
        raise Unavailable(f"its windows of {windows.shape[1]} tokens exceed the model's context of {context}")
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(windows.max()) >= vocabulary:
        raise Unavailable(f"token id {int(windows.max())} is not in the model's vocabulary of {vocabulary}")
    if loaded.weights is None:
        with _recorded(loaded, asked.decided, record):
            result = perplexity(model, windows, window, settings.batch_size, asked.on_count)
    else:
        from besa_exp.evaluation.streamed import streamed_perplexity

        result = streamed_perplexity(model, loaded.weights, windows, settings.batch_size, asked.on_count)
    if not math.isfinite(result.value):
        raise Unavailable(
            f"the perplexity is not a finite number ({result.value}): the losses are beyond 709 nats a token"
        )
    counts = {name: count for name, count in asdict(result).items() if name != "value"}
    return result.value, record | counts | {"tokens_sha256": tokens_sha256(windows)}


def windows_of(
    source: str, tokenizer: Tokenizer | None, window: int, offline: bool, column: str = COLUMN, most: int | None = None
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


def _score_tasks(asked: _Asked) -> tuple[Mapping[str, Any], list[Score]]:
    """What all tasks have in common, and their scores."""
    loaded, settings = asked.loaded, asked.settings
    asked.on_progress("loading lm-eval")
    tasks, scores, scored, common = list(scored_names(settings)), [], None, {}
    with asked.noting(*tasks):
        scored, common = _harness(asked)
    if scored is None:
        return {}, []
    from besa_exp.evaluation.zero_shot import score_task

    def score(asked: _Asked, task: str) -> tuple[Any, Any]:
        under: dict[str, Any] = {}
        with _recorded(loaded, asked.decided, under, PADDING):
            metrics, record = score_task(task, scored, settings, asked.offline, asked.seed)
        return metrics, {**record, **under}

    keys = ("limit", "num_fewshot", "include_path")
    request = {key: getattr(settings, key) for key in keys} | {"seed": asked.seed, "data": settings.data_dir}
    for task in tasks:
        if found := asked.measured("zero_shot", task, request, score):
            scores += task_scores(task, *found)
    return common, scores


def _harness(asked: _Asked) -> tuple[Any, dict[str, Any]]:
    """The model as lm-eval scores it, and what all tasks have in common. Unavailable: why no task can be scored."""
    loaded, batch_size = asked.loaded, asked.settings.batch_size
    if loaded.tokenizer is None:
        raise Unavailable("the model has no tokenizer; a zero-shot task needs one")
    if loaded.tokenizer.bos_token_id is None and loaded.tokenizer.eos_token_id is None:
        raise Unavailable("the tokenizer has neither BOS nor EOS; lm-eval needs one: name it in tokenizer_config.json")
    try:
        import lm_eval

        from besa_exp.evaluation.zero_shot import harness
    except ImportError as error:
        raise Unavailable(f"lm-eval cannot be imported ({error}); pip install 'lm-eval[hf]>=0.4.13'") from error
    scored: Any = harness(loaded, batch_size, asked.context)
    scored.on_count = asked.on_count
    return scored, {
        "lm_eval": lm_eval.__version__,
        "batch_size": batch_size,
        "limit": asked.settings.limit,
        "seed": asked.seed,
        "max_length": asked.context,
        "tokenizer_adds_bos": begins_with_bos(loaded.tokenizer),
    }
