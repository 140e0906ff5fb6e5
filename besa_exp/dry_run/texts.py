"""What a dry run reads: the model's config, its tokenizer, and the texts, cut into tokens as the run would do it.

Nothing is downloaded but a config. What is not in the local caches, or is larger than `LARGEST_TEXT`, is left out with
a note, and the seconds that hang on it are not estimated."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa_exp.checkpoints.load import load_tokenizer, model_context
from besa_exp.dry_run.sizes import local_folder
from besa_exp.errors import ConfigurationError, Unavailable, as_unavailable, first_line
from besa_exp.evaluation.checks import perplexity_window
from besa_exp.evaluation.scores import windows_of
from besa_exp.evaluation.task_definitions import scored_names
from besa_exp.settings import RunSettings
from besa_exp.texts.calibration import load_calibration
from besa_exp.texts.sources import HUB_FILES, Use, fetch

LARGEST_TEXT = 30e6  # bytes of a file that is read here; C4's shard has 320 MB
ASKED = 64  # questions of a task whose lengths stand for all


@dataclass(frozen=True)
class Texts:
    """The calibration's shape and the seconds it takes; of each perplexity set (windows, seq_len); of each task
    (requests, tokens of each); the seconds that an evaluation takes to read them. None: not estimated."""

    samples: int
    seq_len: int
    calibrate: float | None
    windows: list[tuple[int, int]]
    requests: list[tuple[int, float]]
    read: float | None
    notes: list[str]


def read_texts(settings: RunSettings, model: PreTrainedModel) -> Texts:
    """Everything there is to read, timed. ConfigurationError: what the run itself would refuse."""
    folder = local_folder(settings.model)
    tokenizer = load_tokenizer(settings.model, folder) if folder else None
    notes: list[str] = []
    samples, seq_len, calibrate = _calibration(settings, model, tokenizer, notes)
    started = time.perf_counter()
    windows, whole = _windows(settings, model, tokenizer, notes)
    requests, all_tasks = _requests(settings, tokenizer, notes)
    read = time.perf_counter() - started if whole and all_tasks else None
    notes += ["evaluator.simulated_speed: its time is not counted"] if settings.evaluator.simulated_speed else []
    return Texts(samples, seq_len, calibrate, windows, requests, read, notes)


def _calibration(
    settings: RunSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, notes: list[str]
) -> tuple[int, int, float | None]:
    wanted = settings.calibration
    source = wanted.path or wanted.name
    if reason := _unread(source, "calibration"):
        notes.append(f"calibration: {reason}")
        return wanted.num_samples, wanted.seq_len, None
    vocabulary = model.get_input_embeddings().num_embeddings
    started = time.perf_counter()
    try:
        found = load_calibration(wanted, tokenizer, model_context(model), offline=True, vocabulary=vocabulary)  # type: ignore[arg-type]
    except ConfigurationError as error:
        if local_folder(settings.model):
            raise
        notes.append(f"calibration: {first_line(error)}")
        return wanted.num_samples, wanted.seq_len, None
    samples, seq_len = found.input_ids.shape
    return samples, seq_len, time.perf_counter() - started


def _windows(
    settings: RunSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, notes: list[str]
) -> tuple[list[tuple[int, int]], bool]:
    """(windows, seq_len) of the sets that are here, and whether all are."""
    window = perplexity_window(settings.evaluator, model_context(model))
    found: list[tuple[int, int]] = []
    for source in settings.evaluator.perplexity_sets:
        try:
            if reason := _unread(source, "perplexity"):
                raise Unavailable(reason)
            asked = settings.evaluator
            count, length = windows_of(source, tokenizer, window, True, asked.column, asked.max_windows)[0].shape
        except Unavailable as error:
            notes.append(f"perplexity on {source}: {first_line(error)}")
        else:
            found.append((count, length))
    return found, len(found) == len(settings.evaluator.perplexity_sets)


def _requests(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase | None, notes: list[str]
) -> tuple[list[tuple[int, float]], bool]:
    """(requests, tokens of each) of the tasks that are here, and whether all are."""
    wanted = settings.evaluator
    if not wanted.tasks:
        return [], True
    if tokenizer is None:
        notes.append("zero-shot: the tokenizer is not on this machine")
        return [], False
    from besa_exp.evaluation.task_loading import load_task
    from besa_exp.evaluation.zero_shot import quiet, seeded

    found, whole = [], True
    for name in scored_names(wanted):
        try:
            with quiet(), seeded(settings.seed), as_unavailable():
                tasks = load_task(name, wanted, offline=True).tasks.values()
                found += [_requests_of(task, wanted.limit, tokenizer, settings.seed) for task in tasks]
        except Unavailable as error:
            notes.append(f"zero-shot {name}: {first_line(error)}")
            whole = False
    return found, whole


def _requests_of(task: Any, limit: int | None, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[int, float]:
    """(requests, tokens of each) of one task, by its first questions; the tokens of written answers are not counted."""
    task.set_fewshot_seed(seed)
    asked = min(ASKED, limit or ASKED, len(task.eval_docs))
    task.build_all_requests(limit=asked, rank=0, world_size=1)
    count = min(limit or len(task.eval_docs), len(task.eval_docs))
    texts = ["".join(part for part in instance.args if isinstance(part, str)) for instance in task.instances]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    return round(count * len(lengths) / asked), statistics.fmean(lengths)


def _unread(source: str, use: Use) -> str | None:
    """Why a text is not read here; None: it is."""
    try:
        path = fetch(source, use, offline=True) if source in HUB_FILES else Path(source).expanduser()
    except Unavailable:
        return f"{source} is not in the local cache"
    size = path.stat().st_size if path.is_file() else 0
    return f"{size / 1e6:,.0f} MB of text are not read here" if size > LARGEST_TEXT else None
