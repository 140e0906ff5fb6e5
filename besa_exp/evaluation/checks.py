"""What can be told about an evaluation before any text, model or library is loaded."""

from __future__ import annotations

from pathlib import Path

from besa_exp.embedded.text import TASK_NAME, TASKS_DIR
from besa_exp.errors import ConfigurationError
from besa_exp.nearest import did_you_mean
from besa_exp.settings import EvaluatorSettings
from besa_exp.text_sources import check_source, is_token_file
from besa_exp.token_files import token_file_shape

# The folder of each task's definition: lm-eval's own, relative to its tasks, or the package's. Naming the folder spares
# lm-eval the reading of its 14,000 definitions (17 s).
TASK_FOLDERS = {
    "piqa": "piqa",
    "boolq": "super_glue/boolq",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
    TASK_NAME: str(TASKS_DIR),
}
LONGEST_DEFAULT_WINDOW = 2048  # the paper's


def perplexity_window(settings: EvaluatorSettings, context: int) -> int:
    """The window in tokens: as asked, else the paper's 2,048 or what the model can take."""
    return settings.seq_len if settings.seq_len is not None else min(LONGEST_DEFAULT_WINDOW, context)


def check_evaluator(settings: EvaluatorSettings, context: int | None) -> list[str]:
    """What is wrong with these settings, in complete sentences. `context` None: the model's is not known yet."""
    return [*_number_problems(settings, context), *_set_problems(settings, context), *_task_problems(settings)]


def _number_problems(settings: EvaluatorSettings, context: int | None) -> list[str]:
    lower = {"seq_len": 2, "limit": 1, "num_fewshot": 0, "batch_size": 1}
    problems = [
        f"evaluator.{key}={getattr(settings, key)}: must be at least {least}; set evaluator.{key}={least} or more"
        for key, least in lower.items()
        if isinstance(given := getattr(settings, key), int) and given < least
    ]
    if context is not None and settings.seq_len is not None and settings.seq_len > context:
        problems.append(
            f"evaluator.seq_len={settings.seq_len}: a window exceeds the model's context of {context}; set "
            f"evaluator.seq_len={context} or less"
        )
    return problems


def _set_problems(settings: EvaluatorSettings, context: int | None) -> list[str]:
    key = "evaluator.perplexity_sets"
    problems = _repeated(settings.perplexity_sets, key)
    for source in settings.perplexity_sets:
        unreadable = check_source(source, key)
        problems += unreadable
        if unreadable or not is_token_file(source):
            continue
        try:
            shape = token_file_shape(Path(source).expanduser())
        except ConfigurationError as error:
            problems += error.problems
            continue
        if len(shape) == 2 and shape[1] < 2:
            problems.append(
                f"{key}={source}: its windows have one token each, and nothing is predicted; give rows of two or more"
            )
        if context is not None and len(shape) == 2 and shape[1] > context:
            problems.append(
                f"{key}={source}: its windows of {shape[1]} tokens exceed the model's context, {context}; cut its rows"
            )
    return problems


def _task_problems(settings: EvaluatorSettings) -> list[str]:
    problems = _repeated(settings.tasks, "evaluator.tasks")
    for task in settings.tasks:
        if task not in TASK_FOLDERS:
            near = did_you_mean(task, TASK_FOLDERS)
            problems.append(f"evaluator.tasks={task}: no such task{near}; tasks: {', '.join(TASK_FOLDERS)}")
    if settings.data_dir is not None and not Path(settings.data_dir).expanduser().is_dir():
        problems.append(
            f"evaluator.data_dir={settings.data_dir}: there is no such folder; give one with TASK/SPLIT.jsonl files, "
            "or evaluator.data_dir=null to use the hub"
        )
    return problems


def _repeated(names: tuple[str, ...], key: str) -> list[str]:
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    return [f"{key}: {name} is named twice; name it once." for name in repeated]
