"""`besa evaluate`: checks the request, all its problems reported together, then scores one checkpoint."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from besa_exp.cli.compose import Composer
from besa_exp.cli.configuration import Unreadable, as_values, read_of_checkpoint
from besa_exp.cli.jobs import summary_line, told
from besa_exp.cli.preflight import preflight_evaluation
from besa_exp.cli.prune import composed
from besa_exp.cli.request import composed_for_one, folder_of
from besa_exp.evaluation.merging import remaining
from besa_exp.run_folder.folder import earlier_results, read_results
from besa_exp.run_folder.inputs import check_scored_inputs
from besa_exp.settings import EvaluationSettings

CONFIG_NAME = "evaluate"


@dataclass(frozen=True)
class _Asked:
    """A request in which nothing is wrong: `config` as plain values, `known` where nothing is left to be scored."""

    settings: EvaluationSettings
    config: dict[str, Any]
    folder: Path
    known: tuple[str, ...] | None


def evaluate(arguments: Sequence[str]) -> int:
    """The exit code: 0 where the scores are there, 1 where scoring failed."""
    return composed("besa evaluate", CONFIG_NAME, arguments, _run)


def _run(arguments: argparse.Namespace) -> int:
    asked = read_asked(arguments)
    results_path = asked.folder / "results.json"
    if asked.known is not None:
        for line in asked.known:
            print(line)
        print(f"finished before: {summary_line(read_results(asked.folder))} -> {results_path}")
        return 0
    from besa_exp.runs.evaluate import evaluate_checkpoint  # imports torch

    def work() -> str:
        results = evaluate_checkpoint(asked.settings, asked.folder, asked.config)
        return f"{summary_line(results)} -> {results_path}"

    return told(work, asked.folder)


def read_asked(arguments: argparse.Namespace) -> _Asked:
    """The checked request; Hydra must be initialized. ConfigurationError: every problem there is."""
    composer, lines, config, unknown = composed_for_one(arguments, CONFIG_NAME, "scores")
    settings, known = _checked(composer, lines, config, unknown)
    if composer.problems or settings is None:
        composer.refuse()
    return _Asked(settings, as_values(config), folder_of(composer, config).expanduser(), known)


def _checked(
    composer: Composer, lines: Sequence[str], config: DictConfig, unknown: set[str]
) -> tuple[EvaluationSettings | None, tuple[str, ...] | None]:
    """The settings, and what is known where nothing is left to be scored; all that is wrong is noted."""
    try:
        settings = read_of_checkpoint(config, EvaluationSettings)
    except Unreadable as error:
        of_another = {"checkpoint"} if "model" in unknown else set()  # it would have come with the model's preset
        found = {key: problem for key, problem in error.by_key.items() if key not in of_another}
        composer.problems = found | composer.problems
        rest, again = composer.without(lines, error.by_key, config)
        if again is not None and "checkpoint" in error.by_key:  # any other will do to check the rest
            again, unknown = copy.deepcopy(again), unknown | {"model"}
            again.checkpoint = "embedded"
        if again is not None and again is not config:
            _checked(composer, rest, again, unknown)
        return None, None
    folder = folder_of(composer, config).expanduser()
    facts, problems = preflight_evaluation(settings, folder, unknown)
    composer.note([*problems, *check_scored_inputs(folder, settings)])
    if composer.problems or not (results := earlier_results(folder)):
        return settings, None
    asked = settings.model.dtype
    others = {entry["dtype"] for entry in results.get("evaluations", [])} - {asked}
    if others and asked != "auto" and not settings.overwrite:
        composer.problems["model.dtype"] = (
            f"model.dtype={asked}: {folder} holds scores of the model in {', '.join(sorted(others))}; overwrite=true "
            "scores again, hydra.run.dir= keeps both"
        )
    context = facts.context if facts else None
    left = remaining(settings.evaluator, settings.seed, context, results, settings.overwrite, settings.skipping)
    composer.note(left.conflicts)
    to_score = ("perplexity_sets", "tasks", "simulated_speed", "speed", "prompts")
    nothing = not any(getattr(left.settings, kind) for kind in to_score)
    return settings, left.known if nothing and left.known else None
