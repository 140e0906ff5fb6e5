"""`besa tune`: checks the request, all its problems reported together, then tunes one checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from besa_exp.cli.configuration import read_of_checkpoint
from besa_exp.cli.jobs import told
from besa_exp.cli.preflight import preflight_tuning
from besa_exp.cli.prune import composed
from besa_exp.cli.request import composed_for_one, folder_of, readable
from besa_exp.display.rows import scored
from besa_exp.hub.publish import publish
from besa_exp.run_folder.folder import drop_work, read_results
from besa_exp.run_folder.status import is_done
from besa_exp.settings import TuneSettings

CONFIG_NAME = "tune"


def tune(arguments: Sequence[str]) -> int:
    """The exit code: 0 where the tuned model is there, 1 where tuning failed."""
    return composed("besa tune", CONFIG_NAME, arguments, _run)


def _run(arguments: argparse.Namespace) -> int:
    settings, folder = _asked(arguments)
    if is_done(folder) and not settings.overwrite:
        drop_work(folder)
        print(f"finished before: {outcome(read_results(folder))} -> {folder}")
        return 0
    from besa_exp.runs.tune import tune_checkpoint  # imports torch

    def work() -> str:
        results = tune_checkpoint(settings, folder)
        publish(folder, settings.save)
        return f"{outcome(results)} -> {folder}"

    return told(work, folder)


def outcome(results: Mapping[str, Any]) -> str:
    """`60.00 % zeros, held-out loss 3.0031 -> 2.6450, perplexity embedded 20.1 -> 15.2`."""
    loss = results["recovery"]["loss"]
    parts = [f"{results['measured_sparsity']:.2%} zeros", f"held-out loss {loss['before']:.4f} -> {loss['after']:.4f}"]
    if task := results["recovery"].get("task"):
        parts.append(f"{task['name']} {task['accuracy']['before']:.4f} -> {task['accuracy']['after']:.4f}")
    before = scored(results["before"])
    for name, score in scored(results).items():
        earlier = before[name].value if name in before else None
        if score.value is not None and earlier is not None:
            parts.append(f"{name} {earlier:.4f} -> {score.value:.4f}")
    return ", ".join(parts)


def _asked(arguments: argparse.Namespace) -> tuple[TuneSettings, Path]:
    """The checked request and its folder; Hydra must be initialized. ConfigurationError: every problem there is."""
    composer, lines, config, unknown = composed_for_one(arguments, CONFIG_NAME, "tunes")
    settings = readable(composer, lines, config, partial(read_of_checkpoint, cls=TuneSettings))
    if settings is None:
        composer.refuse()
    folder = folder_of(composer, config).expanduser()
    composer.note(preflight_tuning(settings, folder, unknown, is_done(folder) and not settings.overwrite))
    if composer.problems:
        composer.refuse()
    return settings, folder
