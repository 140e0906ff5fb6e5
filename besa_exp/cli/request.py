"""From the arguments of `besa prune` to the jobs they ask for, with everything that is wrong with them found first.

Nothing is written here. A value that cannot be used is left out once it is noted, so that it hides no other problem.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from besa_exp.cli.compose import Composer, key_of, told_sweep
from besa_exp.cli.configuration import Unreadable, as_values, method_name, read_settings
from besa_exp.cli.launchers import launcher_lines, launcher_of
from besa_exp.cli.preflight import preflight
from besa_exp.errors import ConfigurationError
from besa_exp.hub.publish import check_names, check_push
from besa_exp.machine.process import set_before_imports
from besa_exp.presets import CONF_DIR, METHOD_GROUPS
from besa_exp.run_folder.identity import check_finished
from besa_exp.run_folder.inputs import check_run_inputs
from besa_exp.run_folder.status import is_done
from besa_exp.tensors.pattern import parse_pattern
from besa_exp.texts.calibration_check import check_asked_windows

T = TypeVar("T")
CONFIG_NAME = "prune"
# Groups whose preset may leave the path to the user, and what is unknown while the embedded one stands in for it.
STANDS_IN = {"model": "model", "calibration": "calibration.path"}
ON_THIS_MACHINE = ("basic_launcher.BasicLauncher", "joblib_launcher.JoblibLauncher", "submitit_launcher.LocalLauncher")


@dataclass(frozen=True)
class Job:
    """One prune: its override lines, its composed configuration and folder, and whether a finished run is there."""

    lines: tuple[str, ...]
    config: DictConfig
    folder: Path
    finished: bool
    number: int = 0  # its place in a sweep


@dataclass(frozen=True)
class Request:
    """What Hydra is to be given, and the jobs that it will make of it. `launcher`: the class that starts them."""

    config_name: str
    lines: tuple[str, ...]
    multirun: bool
    launcher: str
    jobs: tuple[Job, ...]


def read_request(arguments: argparse.Namespace) -> Request:
    """The checked request; Hydra must be initialized. ConfigurationError: every problem there is."""
    composer = composer_of(arguments)
    overrides = composer.parse(arguments.overrides)
    unknown = set(composer.problems)
    varied = {override.key_or_group for override in overrides if override.is_sweep_override()}
    fixed = [override for override in overrides if override.key_or_group not in varied]
    single = [str(o.input_line) for o in fixed if o.key_or_group.split(".")[0] not in varied]  # a key may need a choice
    main = composed_by(composer, single)
    multirun = arguments.multirun or main.hydra.mode == RunMode.MULTIRUN
    if multirun:
        params = [f"{key}={value}" for key, value in (main.hydra.sweeper.params or {}).items()]
        jobs = _jobs(composer, composer.spread(overrides, params), unknown)
        pushed = [str(OmegaConf.select(job.config, "save.push_to_hub") or "") for job in jobs]
        composer.note(check_names(pushed))
    else:
        swept = [override for override in overrides if override.is_sweep_override()]
        composer.problems |= {o.key_or_group: told_sweep(o, "add -m to run them all") for o in swept}
        jobs = [_job(composer, single, main, unknown, of_sweep=False)]
    _ask_pruners(composer, jobs, unknown)
    if not jobs:
        composer.note([] if composer.problems else ["the sweep has no jobs"])
    if composer.problems:
        composer.refuse()
    lines = (*arguments.overrides, *composer.search_path, *(launcher_lines(main) if multirun else ()))
    return Request(composer.config_name, lines, multirun, launcher_of(main), tuple(jobs))


def checked_composition(arguments: argparse.Namespace, config_name: str = CONFIG_NAME) -> DictConfig:
    """For flags that show the configuration. ConfigurationError: it cannot be composed."""
    composer = composer_of(arguments, config_name)
    config = composer.compose([str(override.input_line) for override in composer.parse(arguments.overrides)])
    if config is None or composer.problems:
        composer.refuse()
    return config


def composer_of(arguments: argparse.Namespace, config_name: str = CONFIG_NAME) -> Composer:
    """Composes with the presets of --config-dir too."""
    name, folder = arguments.config_name or config_name, arguments.config_dir
    if folder is not None and not Path(folder).is_dir():
        raise ConfigurationError(f"--config-dir={folder}: there is no such folder; check the path")
    places = map(Path, filter(None, [arguments.config_path or CONF_DIR, folder]))
    if arguments.config_name and not any((place / f"{name.removesuffix('.yaml')}.yaml").is_file() for place in places):
        raise ConfigurationError(f"--config-name={name}: there is no such file; leave it out, and choose GROUP=PRESET")
    if folder is None:
        given = [line for line in arguments.overrides if key_of(line) == "hydra.searchpath"]
        return Composer(name, tuple(given))
    return Composer(name, (f"hydra.searchpath=['file://{Path(folder).absolute()}']",), Path(folder))


def composed_for_one(
    arguments: argparse.Namespace, config_name: str, does: str
) -> tuple[Composer, list[str], DictConfig, set[str]]:
    """What a command that takes one checkpoint is asked, sweeps noted as problems: the composer, the lines, the
    configuration, and the keys that are unknown. `does`: `scores` or `tunes`. ConfigurationError: it does not
    compose."""
    composer = composer_of(arguments, config_name)
    overrides = composer.parse(arguments.overrides)
    unknown = set(composer.problems)
    swept = [override for override in overrides if override.is_sweep_override()]
    composer.problems |= {o.key_or_group: told_sweep(o, f"one command {does} one checkpoint") for o in swept}
    if arguments.multirun:
        composer.problems["-m"] = f"-m: one command {does} one checkpoint; leave -m out, and loop in the shell"
    lines = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    return composer, lines, composed_by(composer, lines), unknown


def composed_by(composer: Composer, lines: Sequence[str]) -> DictConfig:
    """The configuration, known before anything is imported that looks for a network. ConfigurationError: it does not
    compose."""
    config = composer.compose(lines)
    if config is None:
        composer.refuse()
    set_before_imports(offline=config.get("offline") is True)
    return config


def _jobs(composer: Composer, lines_of_jobs: Sequence[Sequence[str]], unknown: set[str]) -> list[Job]:
    """The jobs of a sweep. Those that differ from the first in one line come first: they show nearly all that can be
    wrong with a large sweep, and where something is, the others are not looked at."""
    jobs: dict[Path, Job] = {}
    differences = [sum(map(str.__ne__, lines, lines_of_jobs[0])) for lines in lines_of_jobs]
    for number in sorted(range(len(lines_of_jobs)), key=differences.__getitem__):
        if composer.problems and differences[number] > 1:
            break
        lines = lines_of_jobs[number]
        config = composer.compose([*lines, f"hydra.job.num={number}", "hydra.mode=MULTIRUN"])
        if config is None:
            continue
        job = replace(_job(composer, lines, config, unknown, of_sweep=True), number=number)
        if job.folder in jobs:
            composer.problems[str(job.folder)] = _shared_folder(job, jobs[job.folder], lines_of_jobs)
        jobs[job.folder] = job
    return list(jobs.values())


def _shared_folder(job: Job, other: Job, lines_of_jobs: Sequence[Sequence[str]]) -> str:
    if set(job.lines) == set(other.lines):
        common = set.intersection(*map(set, lines_of_jobs))
        twice = " ".join(line for line in job.lines if line not in common) or " ".join(job.lines)
        return f"{twice} is named twice in the sweep; name each value once"
    pairs = ((other.lines, job.lines), (job.lines, other.lines))
    different = " and ".join(" ".join(sorted(set(one) - set(two))) for one, two in pairs)  # as `seed=1 and seed=2`
    return (
        f"two jobs of the sweep would share the folder {job.folder}, with {different}: what distinguishes them does "
        "not change the result; drop one, or give each its own with hydra.sweep.subdir='${hydra.job.num}'"
    )


def _job(composer: Composer, lines: Sequence[str], config: DictConfig, unknown: set[str], of_sweep: bool) -> Job:
    """The job, its problems (but its pruner's) noted unless a finished run is there."""
    folder = folder_of(composer, config, of_sweep)
    job = Job(tuple(lines), config, folder, is_done(folder) and not config.get("overwrite"))
    if not job.finished:
        _check_settings(composer, job, unknown | {"pruner"})
    else:
        _check_finished(composer, job)
    return job


def readable(composer: Composer, lines: Sequence[str], config: DictConfig, read: Callable[[DictConfig], T]) -> T | None:
    """What is read of the configuration. None: values that cannot be read; they, and what is wrong with the others, are
    noted."""
    try:
        return read(config)
    except Unreadable as error:
        composer.problems |= error.by_key
        rest, again = composer.without(lines, error.by_key, config)
        if again is not None and again is not config:
            readable(composer, rest, again, read)
        return None


def folder_of(composer: Composer, config: DictConfig, of_sweep: bool = False) -> Path:
    """Where the run is to be; a problem is noted where its name cannot be made. What `${hydra:...}` stands for in
    `config` is known from here on."""
    HydraConfig.instance().set_config(config)
    try:
        return Path(config.hydra.sweep.dir, config.hydra.sweep.subdir) if of_sweep else Path(config.hydra.run.dir)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        if not reason.startswith(Unreadable.__name__):  # which is told with the settings
            composer.problems["hydra.run.dir"] = f"the run folder's name cannot be made: {reason}"
        return Path()


def _check_finished(composer: Composer, job: Job) -> None:
    """Notes what speaks against showing a finished run: it answers another request, its inputs are others now, or it
    cannot be pushed."""
    asked = as_values(job.config) | {"method": method_name(job.config.hydra.runtime.choices)}
    if others := check_finished(job.folder, asked):
        composer.note(others)
        return
    try:
        settings = read_settings(job.config, "", with_pruner=False)
    except Unreadable:  # what it was asked with then is no key or value any more
        return
    composer.note(check_push(settings.save, settings.offline) if settings.save.push_to_hub else [])
    for problem in check_run_inputs(job.folder, settings):  # of many jobs with the same input the first is named
        composer.problems.setdefault(problem.partition(" holds ")[2], problem)


def _ask_pruners(composer: Composer, jobs: Sequence[Job], unknown: set[str]) -> None:
    """Notes what the jobs' pruners refuse. Their modules import torch, which takes seconds: they are asked when all is
    well otherwise, or when the request says something to them."""
    sound = not composer.problems
    for job in jobs:
        if not job.finished and "pruner" not in unknown and (sound or _concerns_the_pruner(composer, job)):
            _check_settings(composer, job, unknown)


def _concerns_the_pruner(composer: Composer, job: Job) -> bool:
    """Whether a line may be refused by the pruner: one of its own keys or presets, or what it is asked to reach."""
    keys = {key_of(line) for line in job.lines}
    own = any(key.startswith(tuple(f"{group}." for group in METHOD_GROUPS)) for key in keys)
    own = own or ("pruner" in keys and composer.search_path)
    asked = {"sparsity", "pattern", "experiment", *METHOD_GROUPS} - {"pruner"}  # a preset of ours is sound by itself
    refused = {problem.partition("=")[0] for problem in composer.problems.values()}
    return bool(own) or bool((asked & keys) - refused)


def _check_settings(composer: Composer, job: Job, unknown: set[str]) -> None:
    """Notes all that is wrong with the job but with what is unknown."""
    try:
        name = method_name(job.config.hydra.runtime.choices)
        settings = read_settings(job.config, name, with_pruner="pruner" not in unknown)
    except Unreadable as error:
        composer.note(error.problems)  # jobs of a sweep have others of the same key
        missing = [group for group in STANDS_IN if OmegaConf.is_missing(job.config[group], "path")]
        rest, config = composer.without(job.lines, error.by_key, job.config)
        if config is job.config:  # with the embedded path where one is missing, so that the rest can be checked
            config, unknown = copy.deepcopy(job.config), unknown | {STANDS_IN[group] for group in missing}
            for group in missing:
                config[group].path = "embedded"
        if config is not None and (missing or len(rest) < len(job.lines)):
            _check_settings(composer, Job(tuple(rest), config, job.folder, False), unknown)
        return
    here = launcher_of(job.config).endswith(ON_THIS_MACHINE)
    composer.note(preflight(settings, job.folder, unknown, here))
    keys = {key_of(line) for line in job.lines}
    if not {"calibration", "calibration.path"} & unknown:
        composer.note(check_asked_windows(settings.calibration, {key.removeprefix("calibration.") for key in keys}))
    if "sparsity" in keys:
        composer.note(_contradiction(settings.sparsity, settings.pattern))


def _contradiction(sparsity: float, pattern: str) -> list[str]:
    try:
        kept, group = parse_pattern(pattern) or (None, 1)
    except ValueError:
        return []  # said already
    fixed = sparsity if kept is None else 1 - kept / group
    if abs(fixed - sparsity) < 1e-9:
        return []
    return [f"sparsity={sparsity:g} with pattern={pattern}: the pattern makes it {fixed:g}; leave sparsity out"]
