"""`besa prune`: checks the request, then lets Hydra run its jobs; flags that only show something are Hydra's own."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import initialize_config_dir
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from besa_exp.cli.configuration import method_name, read_settings
from besa_exp.cli.jobs import launch, run_job, show
from besa_exp.cli.request import CONFIG_NAME, Job, Request, checked_composition, read_request
from besa_exp.cli.show import explained
from besa_exp.cli.text_keys import with_text_quoted
from besa_exp.errors import ConfigurationError
from besa_exp.machine.process import command_line, is_launched
from besa_exp.presets import CONF_DIR
from besa_exp.settings import RunSettings

HYDRA_VERSION = "1.3"
ANSWERED_BY_HYDRA = ("help", "hydra_help", "cfg", "info", "shell_completion", "experimental_rerun")


def prune(arguments: Sequence[str]) -> int:
    """The exit code: the highest of the jobs' own."""
    return composed("besa prune", CONFIG_NAME, arguments, _run)


def composed(
    command: str, config_name: str, arguments: Sequence[str], carry_out: Callable[[argparse.Namespace], Any]
) -> Any:
    """What `carry_out` makes of the arguments, Hydra being initialized; flags that only show something are answered by
    Hydra."""
    arguments = [with_text_quoted(argument) for argument in arguments]
    parsed = _parsed(command, arguments)
    conf_dir = str(Path(parsed.config_path or CONF_DIR).absolute())
    with initialize_config_dir(conf_dir, job_name="besa", version_base=HYDRA_VERSION):
        if not any(getattr(parsed, flag) for flag in ANSWERED_BY_HYDRA):
            return carry_out(parsed)
        config = checked_composition(parsed, config_name) if parsed.cfg or parsed.info or parsed.help else None
    if config is None or not parsed.help:
        return hydra_flags(arguments, config_name)
    beside = Path(parsed.config_dir) if parsed.config_dir else None
    with explained(config_name, config.hydra.runtime.choices, beside):
        return hydra_flags(arguments, config_name)


def _parsed(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """As Hydra reads its flags. ConfigurationError: one that there is not, above all a key with dashes before it."""
    parser = get_args_parser()
    parser.prog = command

    def refuse(message: str) -> NoReturn:
        unknown = [word for word in message.partition("unrecognized arguments: ")[2].split(" ") if word[:2] == "--"]
        keys = [word.lstrip("-").partition("=") for word in unknown]
        problems = [
            f"{word}: no such flag; a key is written without dashes: {name}={value or 'VALUE'} ({command} --help)"
            for word, (name, _, value) in zip(unknown, keys, strict=True)
        ]
        raise ConfigurationError(*(problems or [f"{message}; {command} --help"]))

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(list(arguments))


def _run(arguments: argparse.Namespace) -> int:
    request = read_request(arguments)
    if request.multirun and is_launched():
        raise ConfigurationError(
            "torchrun runs one job on all its processes: leave -m out and give each job a command of its own"
        )
    if any(job.config.get("dry_run") for job in request.jobs):
        return dry_run(request)
    began = time.monotonic()
    outcomes = launch(request)
    if not request.multirun and outcomes[0].status == "refused":
        raise ConfigurationError(*outcomes[0].text.splitlines())
    show(outcomes, time.monotonic() - began)
    return max(outcome.exit_code for outcome in outcomes)


def dry_run(request: Request) -> int:
    """Shows what each job would need, and runs none."""
    if is_launched():
        raise ConfigurationError("dry_run=true: shows the needs of one process; leave torchrun out")
    from besa_exp.dry_run.tables import show_estimates  # imports torch

    def settings(job: Job) -> RunSettings:
        return read_settings(job.config, method_name(job.config.hydra.runtime.choices))

    show_estimates([(settings(job), job.folder, job.finished) for job in request.jobs])
    return 0


def hydra_flags(arguments: Sequence[str], config_name: str = CONFIG_NAME) -> int:
    """--cfg, --info, --help, completion and the like, as any Hydra program answers them."""
    with command_line(["besa", *arguments]):
        try:
            hydra.main(config_path=str(CONF_DIR), config_name=config_name, version_base=HYDRA_VERSION)(_rerun)()
        except ValueError as error:  # flags that exclude each other
            raise ConfigurationError(str(error)) from error
    return 0


def _rerun(config: DictConfig) -> None:
    """What --experimental-rerun runs."""
    outcome = run_job(config)
    show([outcome])
    sys.exit(outcome.exit_code)
