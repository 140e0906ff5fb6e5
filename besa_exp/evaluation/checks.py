"""What can be checked of an evaluation before any text, model or library is loaded."""

from __future__ import annotations

from pathlib import Path

from besa_exp.errors import ConfigurationError, did_you_mean_one_of
from besa_exp.evaluation.task_definitions import TASK_FOLDERS, all_names, find, read_definitions, tasks_root, unreadable
from besa_exp.rules import broken_rules
from besa_exp.settings import EvaluatorSettings, SkippingSettings
from besa_exp.texts.sources import check_source, is_token_file
from besa_exp.texts.token_files import token_file_shape

LONGEST_DEFAULT_WINDOW = 2048  # the paper's
PROMPTS = ("Once upon a time", "The capital of France is", "Return the number of")


def perplexity_window(settings: EvaluatorSettings, context: int) -> int:
    """The window in tokens: as asked, else the paper's 2,048 or what the model can take."""
    return settings.seq_len if settings.seq_len is not None else min(LONGEST_DEFAULT_WINDOW, context)


def prompts_of(settings: EvaluatorSettings) -> tuple[str, ...]:
    """The prompts of the text samples: as asked, else the fixed ones where anything is scored that takes longer."""
    if settings.prompts is not None:
        return settings.prompts
    return PROMPTS if settings.perplexity_sets or settings.tasks else ()


def check_evaluator(settings: EvaluatorSettings, context: int | None) -> list[str]:
    """What is wrong with these settings, in complete sentences. `context` None: the model's is not known yet."""
    prompts = settings.prompts or ()
    problems = [] if all(prompts) else ["evaluator.prompts: one is empty; write at least a character"]
    problems += [*_repeated(prompts, "evaluator.prompts"), *broken_rules(settings, "evaluator")]
    if context is not None and settings.seq_len is not None and settings.seq_len > context:
        problems.append(
            f"evaluator.seq_len={settings.seq_len}: a window exceeds the model's context of {context}; set "
            f"evaluator.seq_len={context} or less"
        )
    return [*problems, *_set_problems(settings, context), *_task_problems(settings)]


def _set_problems(settings: EvaluatorSettings, context: int | None) -> list[str]:
    key = "evaluator.perplexity_sets"
    problems = _repeated(settings.perplexity_sets, key)
    for source in settings.perplexity_sets:
        unreadable = check_source(source, key, "perplexity", settings.column)
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
    problems = _include_problems(settings)
    if not problems and tasks_root() is not None:  # without lm-eval no task can be scored, and each says so
        tasks = dict.fromkeys(settings.tasks)
        problems += [problem for task in tasks for problem in _unknown_task(task, settings.include_path)]
    problems += _repeated(settings.tasks, "evaluator.tasks")
    if settings.data_dir is not None and not Path(settings.data_dir).expanduser().is_dir():
        problems.append(
            f"evaluator.data_dir={settings.data_dir}: there is no such folder; give one with TASK/SPLIT.jsonl files, "
            "or evaluator.data_dir=null to use the hub"
        )
    return problems


def _include_problems(settings: EvaluatorSettings) -> list[str]:
    """What is wrong with the folder of one's own definitions."""
    if settings.include_path is None:
        return []
    key, folder = f"evaluator.include_path={settings.include_path}", Path(settings.include_path).expanduser()
    if not folder.is_dir():
        return [f"{key}: there is no such folder; give the one that holds the tasks' YAML files"]
    if not read_definitions(folder):
        broken = "; ".join(unreadable(folder)) or "no .yaml file in it has a task or a group"
        return [f"{key}: defines no task ({broken})"]
    return []


def _unknown_task(task: str, include_path: str | None) -> list[str]:
    if (task in TASK_FOLDERS and include_path is None) or find(task, include_path):
        return []
    near = did_you_mean_one_of(task, all_names(include_path))
    broken = "".join(f"; {problem}" for problem in unreadable(Path(include_path).expanduser())) if include_path else ""
    return [
        f"evaluator.tasks={task}: lm-eval knows no such task, group or tag{near}; `lm_eval ls tasks` lists them, and "
        f"evaluator.include_path adds your own{broken}"
    ]


def check_skipping(settings: SkippingSettings, load: str = "auto") -> list[str]:
    """What is wrong with a policy, in complete sentences; `load` is model.load."""
    of, problems = settings, broken_rules(settings, "skipping")
    needs = {"ffn": "skipping.threshold or ", "static": "skipping.blocks or ", "shortgpt_gen": "skipping.blocks or "}
    if of.fraction is None and (of.is_calibrated or of.name == "random"):
        problems.append(
            f"skipping={of.name}: does not say how much to skip; set {needs.get(of.name, '')}skipping.fraction"
        )
    if of.name == "shortgpt_gen" and of.prompt_tokens == 0:
        problems.append("skipping.prompt_tokens=0: must be at least 1, as prompts alone skip blocks")
    if load == "streamed":
        problems.append("model.load=streamed: skipping needs the whole model in memory; set model.load=whole")
    return problems


def _repeated(names: tuple[str, ...], key: str) -> list[str]:
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    return [f"{key}: {name} is named twice; name it once." for name in repeated]
