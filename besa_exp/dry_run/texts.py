"""What a dry run reads: the tokenizer and the texts, by the run's own functions, cut into tokens as by the run.

Nothing is downloaded. What is not in the local caches is left out with a note, and the seconds that hang on it are not
estimated."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from math import nan

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa_exp.checkpoints.load import load_tokenizer, model_context, vocabulary_size
from besa_exp.dry_run.sizes import local_folder
from besa_exp.errors import ConfigurationError, Unavailable, as_unavailable, first_line
from besa_exp.evaluation.checks import perplexity_window
from besa_exp.evaluation.scores import windows_of
from besa_exp.evaluation.task_definitions import scored_names
from besa_exp.settings import RunSettings
from besa_exp.texts.calibration import load_calibration

ASKED = 64  # questions of a task whose lengths stand for all


@dataclass
class Texts:
    """The calibration's shape and the seconds it takes; of each perplexity set (windows, seq_len); of each task
    (requests, tokens of each); the seconds that an evaluation takes to read them. NaN: not estimated."""

    samples: int
    seq_len: int
    calibrate: float = 0.0
    windows: list[tuple[int, int]] = field(default_factory=list)
    requests: list[tuple[int, float]] = field(default_factory=list)
    read: float = 0.0
    notes: list[str] = field(default_factory=list)


def read_texts(settings: RunSettings, model: PreTrainedModel) -> Texts:
    """Everything there is to read, timed. ConfigurationError: what the run itself would refuse."""
    wanted, scored, context = settings.calibration, settings.evaluator, model_context(model)
    folder, found = local_folder(settings.model), Texts(wanted.num_samples, wanted.seq_len)
    tokenizer = load_tokenizer(settings.model, folder) if folder else None
    started = time.perf_counter()
    if not settings.is_dense:
        try:
            ids = load_calibration(
                wanted, tokenizer, context, offline=True, vocabulary=vocabulary_size(model)
            ).input_ids
            (found.samples, found.seq_len), found.calibrate = ids.shape, time.perf_counter() - started
        except ConfigurationError as error:
            if folder and not isinstance(error.__cause__, Unavailable):
                raise
            found.calibrate = nan
            found.notes.append(f"calibration: {first_line(error)}")
    started, lacking = time.perf_counter(), 0.0
    for source in (*scored.perplexity_sets, *scored_names(scored)):
        is_set = source in scored.perplexity_sets
        try:
            if is_set:
                window = perplexity_window(scored, context)
                count, length = windows_of(source, tokenizer, window, True, scored.column, scored.max_windows)[0].shape
                found.windows.append((count, length))
            else:
                found.requests += _requests(settings, source, tokenizer)
        except Unavailable as error:
            found.notes.append(f"{'perplexity on' if is_set else 'zero-shot'} {source}: {first_line(error)}")
            lacking = nan
    found.read = time.perf_counter() - started + lacking
    found.notes += ["evaluator.simulated_speed: its time is not counted"] if scored.simulated_speed else []
    return found


def _requests(settings: RunSettings, name: str, tokenizer: PreTrainedTokenizerBase | None) -> list[tuple[int, float]]:
    """(requests, tokens of each) of the tasks that a name stands for, by their first questions; the tokens of written
    answers are not counted."""
    if tokenizer is None:
        raise Unavailable("the tokenizer is not on this machine")
    from besa_exp.evaluation.task_loading import load_task
    from besa_exp.evaluation.zero_shot import quiet, seeded

    found = []
    with quiet(), seeded(settings.seed), as_unavailable():
        for task in load_task(name, settings.evaluator, offline=True).tasks.values():
            task.set_fewshot_seed(settings.seed)
            count = min(settings.evaluator.limit or len(task.eval_docs), len(task.eval_docs))
            asked = min(ASKED, count)
            task.build_all_requests(limit=asked, rank=0, world_size=1)
            texts = ["".join(part for part in one.args if isinstance(part, str)) for one in task.instances]
            lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
            found.append((round(count * len(lengths) / asked), statistics.fmean(lengths)))
    return found
