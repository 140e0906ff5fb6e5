"""`besa prefetch`: what a run of the same keys takes from the hub, what of it the caches hold, and the download of the
rest; a manifest says what lies where, in which version."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hydra.types import RunMode
from omegaconf import DictConfig
from rich import box
from rich.markup import escape
from rich.table import Table

from besa_exp.cli.compose import Composer
from besa_exp.cli.configuration import method_name, read_settings
from besa_exp.cli.hub_needs import Held, Need, bring, described, held, needs_of, prefetch_command
from besa_exp.cli.preflight import check_model
from besa_exp.cli.prune import composed
from besa_exp.cli.request import CONFIG_NAME, composed_by, composer_of, readable
from besa_exp.display.terminal import console_of
from besa_exp.errors import Unavailable
from besa_exp.evaluation.checks import check_evaluator
from besa_exp.hub.client import hub_problem
from besa_exp.machine import atomic
from besa_exp.settings import RunSettings
from besa_exp.texts.calibration_check import check_calibration

Status = Literal["there", "fetched", "missing"]
HELP = """\
besa prefetch [key=value ...]. Downloads what a run with these keys needs from the hub, or lists what is missing.
Its groups, keys and flags are those of besa prune:
"""
WIDTH_OF_FILES = 200  # columns of a table that no terminal shows


@dataclass(frozen=True)
class Item:
    """What became of one need; `reason` where it is missing."""

    need: Need
    status: Status
    held: Held | None = None
    reason: str = ""


def prefetch(arguments: Sequence[str]) -> int:
    """The exit code: 0 where all is there in the end, 1 where something is missing."""
    if {"--help", "-h"} & {*arguments}:
        print(HELP)
    return composed("besa prefetch", CONFIG_NAME, arguments, _run)


def _run(arguments: argparse.Namespace) -> int:
    jobs = _settings_of_jobs(arguments)
    of_jobs = (needs_of(job.model, job.calibration, job.evaluator, job.recovery) for job in jobs)
    needs = list(dict.fromkeys(need for needs in of_jobs for need in needs))
    if not needs:
        print("nothing is needed from the hub: model, text and tasks are on this machine")
        return 0
    unreachable = "offline=true" if any(job.offline for job in jobs) else _silent()
    items = [_settled(need, unreachable) for need in needs]
    _show(items)
    path = _write_manifest(items)
    missing = [item.need for item in items if item.status == "missing"]
    print(f"{len(items) - len(missing)} of {len(items)} are on this machine; manifest: {path}")
    if missing:
        hint = f"; nothing was downloaded ({unreachable}): where there is a network, {prefetch_command(missing)}"
        print(f"{len(missing)} missing" + (hint if unreachable else ""), file=sys.stderr)
    return 1 if missing else 0


def _settings_of_jobs(arguments: argparse.Namespace) -> list[RunSettings]:
    """The settings of every job that `besa prune` with these arguments would run. ConfigurationError: all that is wrong
    with them."""
    composer = composer_of(arguments)
    overrides = composer.parse(arguments.overrides)
    single = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    main = composed_by(composer, single)
    swept = arguments.multirun or main.hydra.mode == RunMode.MULTIRUN or len(single) < len(overrides)
    params = [f"{key}={value}" for key, value in (main.hydra.sweeper.params or {}).items()]
    spread = composer.spread(overrides, params) if swept else [single]
    jobs = []
    for lines in spread:
        config = composer.compose(lines) if swept else main
        if config is not None:
            jobs.append(readable(composer, lines, config, partial(_settings, composer)))
    if composer.problems:
        composer.refuse()
    return [job for job in jobs if job is not None]


def _settings(composer: Composer, config: DictConfig) -> RunSettings:
    """The settings of one job; what is wrong with them is noted. Unreadable: values that are none."""
    settings = read_settings(config, method_name(config.hydra.runtime.choices), with_pruner=False)
    composer.note(check_model(settings.model)[1])
    composer.note(check_calibration(settings.calibration, None) + check_evaluator(settings.evaluator, None))
    return settings


def _silent() -> str | None:
    from huggingface_hub import constants

    return (problem := hub_problem()) and f"{constants.ENDPOINT} does not answer: {problem}"


def _settled(need: Need, unreachable: str | None) -> Item:
    """What the caches hold of one need, after a download where that is possible."""
    try:
        return Item(need, "there", held(need))
    except Unavailable as error:
        if unreachable:
            return Item(need, "missing", reason=str(error))
    print(f"fetching {described(need)}", flush=True)
    try:
        bring(need)
        return Item(need, "fetched", held(need))
    except Unavailable as error:
        return Item(need, "missing", reason=str(error))


def _show(items: Sequence[Item]) -> None:
    table = Table(box=box.SIMPLE)
    for column in ("status", "what", "bytes", "commit", "where, or why not"):
        table.add_column(column, overflow="fold", justify="right" if column == "bytes" else "left")
    for item in items:
        size = f"{sum(item.held.files.values()):,}" if item.held else ""
        commit = ((item.held.commit if item.held else None) or "")[:12]
        where = str(item.held.where) if item.held else item.reason
        style = "red" if item.status == "missing" else None
        table.add_row(item.status, escape(described(item.need)), size, commit, escape(where), style=style)
    console_of(WIDTH_OF_FILES).print(table)


def _write_manifest(items: Sequence[Item]) -> Path:
    """What, from where, in which version, how large, and where it lies; named after what was asked for, so that the
    same request finds its own."""
    entries: list[dict[str, Any]] = []
    for item in items:
        lies = (
            {"where": str(item.held.where), "commit": item.held.commit, "files": item.held.files} if item.held else {}
        )
        entries.append({**asdict(item.need), "status": item.status, "reason": item.reason or None, **lies})
    wanted = json.dumps([asdict(item.need) for item in items], sort_keys=True)
    path = Path("outputs") / f"prefetch-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}.json"
    path.parent.mkdir(exist_ok=True)
    caches = {name: os.environ.get(name) for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")}
    atomic.write_text(path, json.dumps({"items": entries, "caches": caches}, indent=2) + "\n")
    return path
