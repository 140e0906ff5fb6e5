"""Scores of tasks through lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), one task or group at a time.

Choices, texts and written answers are scored as lm-eval scores them; what is ours is how requests become batches and
what is refused. A prompt begins with BOS where the tokenizer puts it there by itself, lm-eval's default of today. The
code of BESA and of Wanda calls an lm-eval of 2023 without special tokens, so the papers' accuracies of LLaMA are those
of prompts without BOS. Import this module inside functions: it loads lm-eval and datasets.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import datasets
import numpy
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from besa_exp.blocks.call_arguments import NotAlone
from besa_exp.checkpoints.load import LoadedModel
from besa_exp.checkpoints.streaming import StreamedWeights
from besa_exp.errors import Unavailable, as_unavailable
from besa_exp.evaluation.batches import BatchSize, halved_until_it_fits, rows_at_once, tokens_at_once
from besa_exp.evaluation.perplexity import finite_logits, uncounted
from besa_exp.evaluation.streamed import HELD_BYTES, logits_of_batches
from besa_exp.evaluation.task_loading import LoadedTasks, load_task
from besa_exp.machine import distributed
from besa_exp.settings import EvaluatorSettings

TaskScore = tuple[dict[str, float], dict[str, Any]]
logger = logging.getLogger(__name__)
# lm-eval's decorators hide these two's signatures from a type checker.
_HFLM: Any = HFLM
_evaluate: Any = evaluate


class Harness(_HFLM):
    """lm-eval's view of a model, that counts the requests it cuts to the context and refuses those it cannot score.

    lm-eval sorts requests by length, longest first. With batch_size="auto" each batch holds `tokens` tokens with its
    padding, so that short questions go many at a time; lm-eval's own "auto" tries up to 64 of the longest in five
    passes and keeps that number for all. A batch that does not fit the device's memory is halved. Every rank gives
    lm-eval the whole task, computes a part of its requests, and receives the answers of all.

    For a streamed model lm-eval forms its batches once to show them, all of them pass through a block before the next
    is read, and lm-eval forms them again to be given their logits. Written answers need the whole model for each token:
    its blocks are read again and again."""

    loaded: LoadedModel
    _answer: Callable[[torch.Tensor], torch.Tensor] | None = None
    cut_requests = 0
    on_count = staticmethod(uncounted)  # how many requests are scored
    tokens = 0
    _first = 0  # the request that the batch being filled began with

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        with self._batches_of(self._longest_batch()):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._check_room(requests)
        generate, own = super().generate_until, requests[distributed.own_slice(len(requests))]

        def attempt(size: int) -> list[str]:
            with self._batches_of(size), self.loaded.callable():
                return generate(own, disable_tqdm=True)

        def answers() -> list[str]:
            with as_unavailable():
                return halved_until_it_fits(attempt, self._longest_batch(), "answer being written")[0]

        return list(chain(*distributed.gathered(distributed.agreed(answers))))

    def _check_room(self, requests: list[Any]) -> None:
        """Counts the prompts that are cut to leave room for an answer. Unavailable: one takes the whole context."""
        for context, options in (request.args for request in requests):
            room = self.max_length - normalize_gen_kwargs(options, self.max_gen_toks).get(
                "max_gen_toks", self.max_gen_toks
            )
            if room < 1:
                raise Unavailable(
                    f"its answers may have {self.max_length - room} tokens; the model's context is {self.max_length}"
                )
            self.cut_requests += len(self.tok_encode(context)) > room

    def _longest_batch(self) -> int:
        """Rows of a batch of the longest sequences there may be."""
        return rows_at_once(self.tokens, self.max_length) if self.batch_size == "auto" else self.batch_size

    @contextlib.contextmanager
    def _batches_of(self, size: int) -> Iterator[None]:
        before, self.batch_size_per_gpu = self.batch_size_per_gpu, size
        try:
            yield
        finally:
            self.batch_size_per_gpu = before

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **options: Any) -> list[tuple[float, bool]]:
        if any(not context or not continuation for _, context, continuation in requests):
            raise Unavailable(
                "one of its choices has no tokens of its own: the tokenizer joins it with what is before it"
            )
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise Unavailable(f"one of its choices has {longest} tokens; the model's context is {self.max_length}")
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        self.cut_requests += sum(length > self.max_length + 1 for length in lengths)
        score, own = super()._loglikelihood_tokens, requests[distributed.own_slice(len(requests))]

        def attempt(size: int) -> list[tuple[float, bool]]:
            if self.batch_size == "auto":
                self.tokens = size
            else:
                self.batch_size_per_gpu = size
            if self.loaded.weights is None:
                return score(own, *args, **options)
            return self._block_by_block(self.loaded.weights, lambda: score(own, *args, **options))

        def scores() -> list[tuple[float, bool]]:
            size = self.tokens if self.batch_size == "auto" else self.batch_size
            with as_unavailable():
                return halved_until_it_fits(attempt, size, f"question of {max(lengths, default=0)} tokens")[0]

        return list(chain(*distributed.gathered(distributed.agreed(scores))))

    def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return self._answer(inps) if self._answer else super()._model_call(inps, *args, **options)

    def _block_by_block(
        self, weights: StreamedWeights, score: Callable[[], list[tuple[float, bool]]]
    ) -> list[tuple[float, bool]]:
        """What `score` returns, of a streamed model."""
        batches: list[torch.Tensor] = []
        vocabulary = self.model.get_input_embeddings().num_embeddings

        def note(ids: torch.Tensor) -> torch.Tensor:
            batches.append(ids)
            return torch.zeros(1, device=ids.device).expand(*ids.shape, vocabulary)

        try:
            self._answer = note
            score()
            logits = logits_of_batches(self.model, weights, batches, HELD_BYTES)
            self._answer = lambda _: next(logits)
            return score()
        except NotAlone as error:
            logger.warning("the streamed model is read again for each batch of questions: %s", error)
        finally:
            self._answer = None
        with self.loaded.callable():
            return score()

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        """The size of the batch that request number `pos` is in. lm-eval asks for each request in turn and closes a
        batch that has this size; its first request is its longest."""
        self._first = 0 if pos == 0 else self._first
        _, context, continuation = n_reordered_requests[self._first]
        size = rows_at_once(self.tokens, min(len(context) + len(continuation), self.max_length))
        if pos - self._first + 1 >= size:
            self._first = pos + 1
            self.on_count(pos + 1, len(n_reordered_requests), "choices")
        return size


def harness(loaded: LoadedModel, batch_size: BatchSize, context: int) -> Harness:
    """The model as lm-eval scores it: requests longer than `context` lose their beginning. The tokenizer is copied,
    because lm-eval gives one without a padding token a new one."""
    tokenizer = copy.deepcopy(loaded.tokenizer)
    with quiet():
        scored = Harness(pretrained=loaded.model, tokenizer=tokenizer, batch_size=batch_size, max_length=context)
    scored.tokens, scored.loaded = tokens_at_once(loaded.model), loaded
    return scored


def score_task(name: str, model: Harness, settings: EvaluatorSettings, offline: bool, seed: int) -> TaskScore:
    """One task's or group's metrics under lm-eval's own keys, and what identifies the measurement. The global random
    states are left as they were. Unavailable: its data cannot be loaded or used, its choices do not fit the model's
    context, or the model's logits are not finite.

    lm-eval's `evaluate` is called, not `simple_evaluate`, which would start pip and compilers to describe the machine,
    once for each task; what that sets up before `evaluate` is done here: few-shot examples and seeds."""
    with quiet(), seeded(seed), finite_logits(model.model), as_unavailable():
        loaded = distributed.agreed(lambda: load_task(name, settings, offline))
        for task in loaded.tasks.values():
            task.set_fewshot_seed(seed)
        model.cut_requests = 0
        given = {"tasks": loaded.tasks, "groups": loaded.groups, "group_map": loaded.group_map}
        results = _evaluate(model, given, limit=settings.limit, log_samples=False)
        return _task_score(name, results, loaded, model.cut_requests)


def _task_score(name: str, results: Any, loaded: LoadedTasks, cut: int) -> TaskScore:
    metrics = _metrics(results["results"].get(name, {}))
    if not metrics:
        raise Unavailable("lm-eval gives it no score that is a finite number; name the tasks in it one by one")
    counts = [results["n-samples"][task] for task in loaded.tasks]
    provenance = {
        "version": results["versions"][name],
        "num_fewshot": results["n-shot"].get(name),
        "documents": sum(count["effective"] for count in counts),
        "questions": sum(count["original"] for count in counts),
        "higher_is_better": results["higher_is_better"].get(name, {}),
        "requests_cut_to_context": cut,
        "data": loaded.data,
    }
    if loaded.unanswerable:
        provenance["unanswerable"] = loaded.unanswerable
    if name not in loaded.tasks:
        provenance["subtasks"] = {
            task: {"documents": count["effective"], **_metrics(results["results"][task])}
            for task, count in zip(loaded.tasks, counts, strict=True)
        }
    return metrics, provenance


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's finite numbers under its own keys, such as `acc,none`; it says N/A where there is none."""
    numbers = {key: value for key, value in found.items() if "," in key and isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random states of Python, NumPy and PyTorch, and put them back: a task may draw from them."""
    python, of_numpy = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        random.seed(seed)
        numpy.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(of_numpy)  # noqa: NPY002


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's notices, some of which are printed, and its progress bars, which go to stderr unasked."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
