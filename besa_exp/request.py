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
    set_before_imports(offline=main.get("offline") is True)
    multirun = arguments.multirun or main.hydra.mode == RunMode.MULTIRUN
    if multirun:
        params = [f"{key}={value}" for key, value in (main.hydra.sweeper.params or {}).items()]
        jobs = _jobs(composer, composer.spread(overrides, params), unknown)
    else:
        swept = [override for override in overrides if override.is_sweep_override()]
        composer.problems |= {o.key_or_group: f"{o.input_line}: several values; add -m to run them all" for o in swept}
        jobs = [_job(composer, single, main, unknown, of_sweep=False)]
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


def _jobs(composer: Composer, lines_of_jobs: Sequence[Sequence[str]], unknown: set[str]) -> list[Job]:
    """The jobs of a sweep. Those that differ from the first in one line come first: they show nearly all that can be
    wrong with a large sweep, and where something is, the others are not looked at."""
    jobs: dict[Path, Job] = {}
    differences = [sum(map(str.__ne__, lines, lines_of_jobs[0])) for lines in lines_of_jobs]
    for number in sorted(range(len(lines_of_jobs)), key=differences.__getitem__):
        if composer.problems and differences[number] > 1:
            break
        lines = lines_of_jobs[number]
        config = composer.compose([*lines, f"hydra.job.num={number}"])
        if config is None:
            continue
        job = _job(composer, lines, config, unknown, of_sweep=True)
        if job.folder in jobs:
            different = _only(lines, jobs[job.folder].lines)
            composer.problems[str(job.folder)] = (
                f"two jobs of the sweep would share the folder {job.folder}, with {different}: what tells them apart "
                "does not change the result; drop one, or give each its own with hydra.sweep.subdir='${hydra.job.num}'"
            )
        jobs[job.folder] = job
    return list(jobs.values())


def _only(lines: Sequence[str], others: Sequence[str]) -> str:
    """The lines in which two jobs differ, as `seed=1 and seed=2`."""
    return " and ".join(" ".join(sorted(set(one) - set(two))) for one, two in ((others, lines), (lines, others)))


def _job(composer: Composer, lines: Sequence[str], config: DictConfig, unknown: set[str], of_sweep: bool) -> Job:
    """The job, its problems noted unless a finished run is there."""
    HydraConfig.instance().set_config(config)  # ${hydra:...} looks there
    try:
        folder = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir) if of_sweep else Path(config.hydra.run.dir)
    except OmegaConfBaseException as error:
        composer.problems["hydra.run.dir"] = f"the run folder's name cannot be made: {str(error).splitlines()[0]}"
        folder = Path()
    job = Job(tuple(lines), config, folder, is_done(folder) and not config.get("overwrite"))
    if not job.finished:
        _check_job(composer, job, unknown)
    return job


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
