"""Zero-shot accuracy through lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), one task at a time.

lm-eval's own task definitions are used: prompts, metrics and versions are never changed. With a local mirror only the
place the documents come from is replaced. Import this module inside functions: it loads lm-eval and datasets.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import jinja2
import lm_eval.tasks
import numpy
import torch
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] # its client's, by version
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa_exp import distributed
from besa_exp.errors import Unavailable, first_line
from besa_exp.evaluation.batches import BatchSize, halved_until_it_fits, rows_at_once, tokens_at_once
from besa_exp.evaluation.checks import TASK_FOLDERS
from besa_exp.hub import offline_hub
from besa_exp.reachability import hub_problem
from besa_exp.settings import EvaluatorSettings

# lm-eval's decorators hide these two's signatures from a type checker.
_HFLM: Any = HFLM
_evaluate: Any = evaluate

# What loading a task raises when its data is not there, not reachable or not of the form that its prompts need.
LOADING_ERRORS = (
    OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, HTTPError, DatasetsError, jinja2.TemplateError,
)  # fmt: skip


@dataclass(frozen=True)
class TaskScore:
    """One task's metrics under lm-eval's own keys, and what identifies the measurement."""

    metrics: dict[str, float]
    provenance: dict[str, Any]


class Harness(_HFLM):
    """lm-eval's view of a model, that counts the requests it cuts to the context and refuses those it cannot score.

    lm-eval sorts requests by length, longest first. With batch_size="auto" each batch holds `tokens` tokens with its
    padding, so that short questions go many at a time; lm-eval's own "auto" tries up to 64 of the longest in five
    passes and keeps that number for all. A batch that does not fit the device's memory is halved. Every rank gives
    lm-eval the whole task, computes a part of its requests, and is told the scores of all."""

    cut_requests = 0
    tokens = 0
    _first = 0  # the request that the batch being filled began with

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **options: Any) -> list[tuple[float, bool]]:
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
            return score(own, *args, **options)

        def scores() -> list[tuple[float, bool]]:
            size = self.tokens if self.batch_size == "auto" else self.batch_size
            return halved_until_it_fits(attempt, size, f"question of {max(lengths, default=0)} tokens")[0]

        return list(chain(*distributed.gathered(distributed.agreed(scores))))

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        """The size of the batch that request number `pos` is in. lm-eval asks for each request in turn and closes a
        batch that has this size; its first request is its longest."""
        self._first = 0 if pos == 0 else self._first
        _, context, continuation = n_reordered_requests[self._first]
        size = rows_at_once(self.tokens, min(len(context) + len(continuation), self.max_length))
        if pos - self._first + 1 >= size:
            self._first = pos + 1
        return size


def harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: BatchSize, context: int) -> Harness:
    """The model as lm-eval scores it: requests longer than `context` lose their beginning. The tokenizer is copied,
    because lm-eval gives one without a padding token a new one."""
    with quiet():
        scored = Harness(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, max_length=context
        )
    scored.tokens = tokens_at_once(model)
    return scored


def score_task(name: str, model: Harness, settings: EvaluatorSettings, offline: bool, seed: int) -> TaskScore:
    """Score one task. The global random states are left as they were. Raises Unavailable where the task's data cannot
    be had, or its choices do not fit the model's context.

    lm-eval's `evaluate` is called, not `simple_evaluate`, which would start pip and compilers to describe the machine,
    once for each task; what that sets up before `evaluate` is done here: few-shot examples and seeds."""
    with quiet(), seeded(seed):
        shots = settings.num_fewshot or 0
        task, source = distributed.agreed(lambda: load_task(name, settings.data_dir, shots, offline))
        task.set_config("num_fewshot", shots)  # no task here has a number of its own
        task.set_fewshot_seed(seed)
        model.cut_requests = 0
        results = _evaluate(model, {"tasks": {name: task}}, limit=settings.limit, log_samples=False)
    metrics = {key: float(value) for key, value in results["results"][name].items() if "," in key and value != "N/A"}
    provenance = {
        "version": results["versions"][name],
        "num_fewshot": results["n-shot"][name],
        "documents": results["n-samples"][name]["effective"],
        "requests_cut_to_context": model.cut_requests,
        "data": source,
    }
    return TaskScore(metrics, provenance)


def load_task(name: str, data_dir: str | None, num_fewshot: int, offline: bool) -> tuple[ConfigurableTask, str]:
    """lm-eval's registered task and where its documents come from. Raises Unavailable with the reason."""
    folder = Path(lm_eval.tasks.__file__).parent / TASK_FOLDERS[name]  # an absolute path stays as it is
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    definition = manager.task_index[name].cfg or {}
    embedded = Path(TASK_FOLDERS[name]).is_absolute()
    mirrored = data_dir is not None and not embedded
    override, source = _mirror(name, definition, Path(data_dir or ""), num_fewshot) if mirrored else ({}, "")
    silent = None if offline or mirrored or embedded else hub_problem()
    try:
        with offline_hub((offline and not mirrored) or silent is not None):
            # A group of one: the way lm-eval offers to change some fields of a registered task and keep the others.
            loaded = manager.load({"group": "one", "task": [{"task": name, **override}]})
    except LOADING_ERRORS as error:
        remedy = "" if embedded else "; set evaluator.data_dir, or run once with a network and offline=false"
        why = f"the hub cannot be reached: {silent}" if silent else first_line(error)
        if mirrored:
            raise Unavailable(
                f"{source.partition(' ')[0]} cannot be asked ({why}): its rows lack a field of {name}'s prompts, or "
                "hold another kind of value; give rows with the fields of the task's own data set"
            ) from error
        raise Unavailable(f"its data cannot be loaded ({why}){remedy}") from error
    task = loaded["tasks"][name]
    assert isinstance(task, ConfigurableTask)
    return task, source or ("embedded" if embedded else f"hub: {definition.get('dataset_path')}")


def _mirror(name: str, definition: dict[str, Any], folder: Path, num_fewshot: int) -> tuple[dict[str, Any], str]:
    """The fields that point a task at `folder`/TASK/SPLIT.jsonl, and the record of what is read."""
    splits = {key: definition.get(key) for key in ("training_split", "validation_split", "test_split")}
    scored = splits["test_split"] or splits["validation_split"]
    shots = definition.get("fewshot_split") or splits["training_split"] or scored
    needed = [scored, *([shots] if num_fewshot and shots != scored else [])]
    paths = {split: folder.expanduser() / name / f"{split}.jsonl" for split in needed}
    for path in paths.values():
        if not path.is_file():
            raise Unavailable(
                f"evaluator.data_dir has no {path}; add the file, or unset evaluator.data_dir for the hub"
            )
    documents = {split: _mirrored_split(path) for split, path in paths.items()}
    kept = {key: split if split in documents else None for key, split in splits.items()}
    digest = hashlib.sha256(paths[scored].read_bytes()).hexdigest()
    # lm-eval calls it with the task's metadata
    return kept | {"custom_dataset": lambda **_: documents}, f"{folder.name}/{name}/{scored}.jsonl sha256:{digest}"


def _mirrored_split(path: Path) -> datasets.Dataset:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return datasets.Dataset.from_list(rows)
    except (ValueError, TypeError, AttributeError) as error:  # not JSON, not UTF-8, not rows of one form
        raise Unavailable(f"{path} cannot be read as JSON lines ({first_line(error)}); replace the file") from error


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random states of Python, NumPy and PyTorch, and put them back: a task may draw from them."""
    python, of_numpy, of_torch = random.getstate(), numpy.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    of_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(of_numpy)  # noqa: NPY002
        torch.set_rng_state(of_torch)
        if of_cuda:
            torch.cuda.set_rng_state_all(of_cuda)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's notices, and without progress bars where nobody watches: they go to stderr unasked."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
