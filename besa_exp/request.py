"""From the arguments of `besa prune` to the jobs they ask for, with everything that is wrong with them found first.

Nothing is written here. A value that cannot be used is left out once it is noted, so that it hides no other problem.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from besa_exp.configuration import Unreadable, read_settings
from besa_exp.environment_variables import set_before_imports
from besa_exp.errors import ConfigurationError
from besa_exp.overrides import Composer, key_of
from besa_exp.run_folder import is_done

CONFIG_NAME = "prune"
ON_THIS_MACHINE = ("basic_launcher.BasicLauncher", "joblib_launcher.JoblibLauncher")


@dataclass(frozen=True)
class Job:
    """One prune: its override lines, its composed configuration and folder, and whether a finished run is there."""

    lines: tuple[str, ...]
    config: DictConfig
    folder: Path
    finished: bool


@dataclass(frozen=True)
class Request:
    """What Hydra is to be given, and the jobs that it will make of it."""

    config_name: str
    lines: tuple[str, ...]
    multirun: bool
    jobs: tuple[Job, ...]


def read_request(arguments: argparse.Namespace) -> Request:
    """The checked request; Hydra must be initialized. ConfigurationError: every problem there is."""
    composer = composer_of(arguments)
    overrides = composer.parse(arguments.overrides)
    unknown = set(composer.problems)
    single = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    main = composer.compose(single)
    if main is None:
        raise ConfigurationError(*composer.problems.values())
    multirun = arguments.multirun or main.hydra.mode == RunMode.MULTIRUN
    if multirun:
        params = [f"{key}={value}" for key, value in (main.hydra.sweeper.params or {}).items()]
        lines_of_jobs = composer.spread(overrides, params)
        configs = [composer.compose([*lines, f"hydra.job.num={i}"]) for i, lines in enumerate(lines_of_jobs)]
    else:
        lines_of_jobs, configs = [single], [main]
        swept = [override for override in overrides if override.is_sweep_override()]
        composer.problems |= {o.key_or_group: f"{o.input_line}: several values; add -m to run them all" for o in swept}
    jobs = _jobs(composer, lines_of_jobs, configs, multirun)
    _check_jobs(composer, jobs, unknown)
    if composer.problems or not jobs:
        raise ConfigurationError(*dict.fromkeys(composer.problems.values()) or ["the sweep has no jobs"])
    return Request(composer.config_name, (*arguments.overrides, *composer.search_path), multirun, tuple(jobs))


def check_composition(arguments: argparse.Namespace) -> None:
    """For flags that show the configuration: ConfigurationError where it cannot be composed."""
    composer = composer_of(arguments)
    composer.compose([str(override.input_line) for override in composer.parse(arguments.overrides)])
    if composer.problems:
        raise ConfigurationError(*composer.problems.values())


def composer_of(arguments: argparse.Namespace) -> Composer:
    """Composes with the presets of --config-dir too."""
    name, folder = arguments.config_name or CONFIG_NAME, arguments.config_dir
    if folder is None:
        given = [line for line in arguments.overrides if key_of(line) == "hydra.searchpath"]
        return Composer(name, tuple(given))
    if not Path(folder).is_dir():
        raise ConfigurationError(f"--config-dir={folder}: there is no such folder; check the path")
    return Composer(name, (f"hydra.searchpath=['file://{Path(folder).absolute()}']",))


def _jobs(
    composer: Composer, lines_of_jobs: Iterable[Sequence[str]], configs: Iterable[DictConfig | None], multirun: bool
) -> list[Job]:
    jobs, problems = [], composer.problems
    for number, (lines, config) in enumerate(zip(lines_of_jobs, configs, strict=True)):
        if config is None:
            continue
        try:
            folder = _folder(config, multirun)
        except OmegaConfBaseException as error:
            problems["hydra.run.dir"] = f"the run folder's name cannot be made: {str(error).splitlines()[0]}"
            continue
        twin = next((job for job in jobs if job.folder == folder), None)
        if twin:
            problems[str(folder)] = (
                f"jobs {jobs.index(twin)} and {number} of the sweep would share the folder {folder}: what tells them "
                "apart does not change the result; sweep something else, or give hydra.sweep.subdir='${hydra.job.num}'"
            )
        jobs.append(Job(tuple(lines), config, folder, is_done(folder) and not config.get("overwrite")))
    return jobs


def _folder(config: DictConfig, multirun: bool) -> Path:
    """Where Hydra will let the job write."""
    HydraConfig.instance().set_config(config)  # ${hydra:...} looks there
    if multirun:
        return Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir
    return Path(config.hydra.run.dir)


def _check_jobs(composer: Composer, jobs: Sequence[Job], unknown: set[str]) -> None:
    unfinished = [job for job in jobs if not job.finished]
    if unfinished:
        set_before_imports(offline=all(job.config.get("offline") is True for job in unfinished))
    for job in unfinished:
        _check_job(composer, job, unknown)


def _check_job(composer: Composer, job: Job, unknown: set[str]) -> None:
    from besa_exp.preflight import preflight  # imports torch, which a finished run's line does not wait for

    problems = composer.problems
    try:
        settings = read_settings(job.config, pruner_preset(job.config))
    except Unreadable as error:
        rest = [line for line in job.lines if not _sets(composer, line, error.by_key)]
        problems |= error.by_key
        config = composer.compose(rest) if len(rest) < len(job.lines) else None
        if config is not None:
            _check_job(composer, Job(tuple(rest), config, job.folder, False), unknown)
        return
    launcher = str(OmegaConf.select(job.config, "hydra.launcher._target_"))
    here = launcher.endswith(ON_THIS_MACHINE)
    problems |= {problem: problem for problem in preflight(settings, job.folder, unknown, here)}
    if any(key_of(line) == "sparsity" for line in job.lines):
        problems |= _contradiction(settings.sparsity, settings.pattern)


def pruner_preset(config: DictConfig) -> str:
    """The pruner's preset in a configuration with Hydra's node."""
    return str(config.hydra.runtime.choices.get("pruner"))


def _sets(composer: Composer, line: str, keys: Iterable[str]) -> bool:
    """Whether the line gives a value (not a preset) to one of the keys or to something below it."""
    key = key_of(line)
    return any(key.startswith(f"{bad}.") or (key == bad and not composer.presets(key)) for bad in keys)


def _contradiction(sparsity: float, pattern: str) -> dict[str, Any]:
    from besa_exp.masks import Target

    try:
        fixed = Target.parse(sparsity, pattern).sparsity
    except ValueError:
        return {}  # said already
    if abs(fixed - sparsity) < 1e-9:
        return {}
    problem = f"sparsity={sparsity:g} with pattern={pattern}: the pattern makes it {fixed:g}; leave sparsity out"
    return {problem: problem}
