"""Jobs as Hydra runs them, here or in another process, and what became of each."""

from __future__ import annotations

import cProfile
import errno
import io
import os
import pstats
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job as run_as_hydra_does
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from besa_exp.cli.compose import key_of
from besa_exp.cli.configuration import as_values, method_name, read_settings
from besa_exp.cli.job_process import run_apart
from besa_exp.cli.launchers import lost_jobs_told, visible_gpus
from besa_exp.cli.request import CONFIG_NAME, Job, Request
from besa_exp.cli.sweep_display import Course, Outcome, Status, show_sweep
from besa_exp.display.console import next_steps
from besa_exp.display.missed_target import miss_of, told_miss
from besa_exp.display.progress import duration
from besa_exp.errors import ConfigurationError, RunError, first_line
from besa_exp.evaluation.score import Scores, main_scores, partly_scored, set_names
from besa_exp.hub.publish import publish
from besa_exp.machine.process import set_before_imports
from besa_exp.machine.streams import keep_streams
from besa_exp.run_folder.folder import RunFolder, absent, drop_work, read_results, remove_refused
from besa_exp.run_folder.status import is_done, read_status, seen_status
from besa_exp.runs.interruption import interruptible

GROUP = "WANDB_RUN_GROUP"  # read when a job's configuration is composed
PROFILE_LINES = 40
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_job(config: DictConfig, course: Course | None = None) -> Outcome:
    """One job, in whatever process the launcher chose; a sweep's in a process of its own. Never raises an Exception: a
    job that fails must not take others with it."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    pruner_name = method_name(hydra_config.runtime.choices)
    if is_done(folder) and not config.overwrite:
        return finished_before(folder, config)
    if hydra_config.mode != RunMode.MULTIRUN:
        return carry_out(config, pruner_name, folder, single=True)
    keep_streams()  # of a launcher's process
    number, lines = hydra_config.job.num, list(hydra_config.overrides.task)
    print(course.line(number, lines, folder) if course else f"job {number + 1}: {' '.join(lines)}", flush=True)
    alone = str(hydra_config.launcher._target_).endswith("BasicLauncher")
    label = "" if alone else f"job {number + 1}: "
    gpus = visible_gpus() if "Joblib" in str(hydra_config.launcher._target_) and config.device == "auto" else []
    gpu = gpus[number % len(gpus)] if len(gpus) > 1 else None
    words, before = _alone(hydra_config), read_status(folder)
    try:
        answer = run_apart(as_values(config), pruner_name, folder, words, label, gpu)
        return Outcome(folder, cast(Status, answer["status"]), answer["text"], answer["missed"])
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this job's failure alone, and reported as such
        status = read_status(folder)
        if status is None or status == before or status["status"] == "running":  # it could not say so itself
            _record(folder, error, words)
        return Outcome(folder, "failed", _named(error))


def _alone(hydra_config: HydraConf) -> list[str]:
    """The words of a command that runs one job of a sweep by itself: what an experiment would sweep is in its lines."""
    name, chosen = str(hydra_config.job.config_name), hydra_config.runtime.choices
    lines = [line for line in hydra_config.overrides.hydra if key_of(line) == "hydra.searchpath"]
    lines += ["hydra.mode=RUN"] if chosen.get("experiment") else []
    return ["besa", "prune", *(["-cn", name] if name != CONFIG_NAME else []), *hydra_config.overrides.task, *lines]


def carry_out(config: DictConfig, pruner_name: str, folder: Path, single: bool = False) -> Outcome:
    """One job in this process. A `single` one that is refused leaves nothing behind."""
    before = read_status(folder)
    try:
        set_before_imports(offline=config.offline)
        return finished("done", folder, _prune(config, pruner_name, folder))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this job's failure alone, and reported as such
        if full_errors():
            traceback.print_exc()
        refused = isinstance(error, ConfigurationError)
        if read_status(folder) == before and not (single and refused):
            _record(folder, error)
        return Outcome(folder, "refused" if refused else "failed", str(error) if refused else _named(error))


def _named(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
        return f"{error}: what is finished is kept; free disk space, then run the same command again"
    return str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"


def _record(folder: Path, error: Exception, words: Sequence[str] | None = None) -> None:
    """Writes the failure into the folder, where that is possible."""
    with suppress(ConfigurationError, OSError):
        RunFolder.record_failure(folder, error, words)


def _prune(config: DictConfig, pruner_name: str, folder: Path) -> dict[str, Any]:
    from besa_exp.cli.preflight import preflight
    from besa_exp.runs.prune import prune  # imports torch

    settings = read_settings(config, pruner_name)
    if problems := preflight(settings, folder):  # again: this may be another machine than the one that asked
        raise ConfigurationError(*problems)
    with interruptible(), _profiling(folder) if settings.profile else nullcontext():
        results = prune(settings, folder, as_values(config))
    publish(folder, settings.save)
    return results


@contextmanager
def _profiling(folder: Path) -> Iterator[None]:
    """Writes profile.txt (the functions with most time of their own, then those with most time in all) and
    profile.pstats (for viewers) into `folder`, whether the block ends well or not."""
    profile = cProfile.Profile()
    try:
        with profile:
            yield
    finally:
        text = io.StringIO()
        stats = pstats.Stats(profile, stream=text)
        for order in ("tottime", "cumulative"):
            stats.sort_stats(order).print_stats(PROFILE_LINES)
        (folder / "profile.txt").write_text(text.getvalue(), encoding="utf-8")
        stats.dump_stats(folder / "profile.pstats")


def finished_before(folder: Path, config: DictConfig) -> Outcome:
    """The outcome of a run whose results were there already; its model is pushed where `config` asks for it now."""
    drop_work(folder)
    if config.save.get("push_to_hub"):
        publish(folder, read_settings(config, "", with_pruner=False).save)
    return finished("finished before", folder, read_results(folder))


def finished(status: Status, folder: Path, results: Mapping[str, Any]) -> Outcome:
    seconds = (results.get("seconds") or {}).get("total")
    took = f", {duration(seconds)}" if seconds is not None else ""
    line = summary_line(results)
    return Outcome(folder, status, line + took, bool(miss_of(results)), line.partition(", ")[0] + took)


def full_errors() -> bool:
    """Whether the user asked for tracebacks, as Hydra has it."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def told(work: Callable[[], str], folder: Path) -> int:
    """The exit code of work in a run folder; what it returns, or its failure, is printed."""
    try:
        with interruptible():
            said = work()
    except (RunError, OSError) as error:
        if full_errors():
            traceback.print_exc()
        print(f"failed: {error}; what is finished is kept; see {folder / 'run.log'}", file=sys.stderr)
        return 1
    print(f"done: {said}")
    return 0


def launch(request: Request) -> list[Outcome]:
    """Runs the jobs by Hydra's launcher. Hydra must be initialized as it was for the request."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    if request.multirun:
        return _sweep(hydra, request)
    (job,) = request.jobs
    if job.finished:
        return [finished_before(job.folder, job.config)]
    made = absent(job.folder)
    outcome = _alone_by_hydra(hydra, request.config_name, job.config)
    if outcome.status == "refused":
        remove_refused(made)
    return [outcome]


def _alone_by_hydra(hydra: Hydra, config_name: str, config: DictConfig) -> Outcome:
    """What Hydra's `run` does, with the configuration that was checked in the place of one composed again."""
    with read_write(config.hydra):
        config.hydra.mode = RunMode.RUN
    callbacks = Callbacks(config)
    callbacks.on_run_start(config=config, config_name=config_name)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    done = run_as_hydra_does(run_job, config, "hydra.run.dir", None, context)
    callbacks.on_run_end(config=config, config_name=config_name, job_return=done)
    return done.return_value


def _sweep(hydra: Hydra, request: Request) -> list[Outcome]:
    """The outcomes in the order of the jobs. Where the launcher itself fails, what the folders say."""
    jobs = sorted(request.jobs, key=lambda job: job.number)
    if all(job.finished for job in jobs):
        return [finished_before(job.folder, job.config) for job in jobs]
    try:
        with lost_jobs_told(request.launcher), grouped(jobs):
            job_of_sweep = partial(run_job, course=Course.of(jobs))
            batches = hydra.multirun(request.config_name, job_of_sweep, [*request.lines, "hydra.mode=MULTIRUN"])
            returned = [job.return_value for batch in batches for job in batch]
    except Exception as error:  # noqa: BLE001 - the jobs that did end are shown nevertheless
        if full_errors():
            traceback.print_exc()
        returned = [first_line(error)] * len(jobs)
    return [
        found if isinstance(found, Outcome) else _outcome_of_lost(job, found)
        for job, found in zip(jobs, returned, strict=True)
    ]


@contextmanager
def grouped(jobs: Sequence[Job]) -> Iterator[None]:
    """W&B shows the jobs as one group, named after what varies and the day, where nothing else gives them one."""
    common = set.intersection(*(set(job.lines) for job in jobs))
    varied = dict.fromkeys(key_of(line) for job in jobs for line in job.lines if line not in common)
    named = GROUP in os.environ or any(OmegaConf.select(job.config, "tracker.group") for job in jobs)
    if not named:
        os.environ[GROUP] = f"sweep of {', '.join(varied) or 'one'}, {datetime.now(UTC):%Y-%m-%d %H:%M}"
    try:
        yield
    finally:
        if not named:
            del os.environ[GROUP]


def _outcome_of_lost(job: Job, reason: str) -> Outcome:
    """What became of a job whose worker did not answer, `reason` being why."""
    if is_done(job.folder):
        return finished("finished before" if job.finished else "done", job.folder, read_results(job.folder))
    status = read_status(job.folder) or {}
    if status.get("status") == "failed":
        return Outcome(job.folder, "failed", status["error"])
    state = seen_status(job.folder) or "not begun"
    text = f"the launcher lost this job ({reason}); its folder says {state}; run the same command again to finish it"
    return Outcome(job.folder, "failed", text)


def summary_line(results: Mapping[str, Any]) -> str:
    """The results of one run in a line: measured sparsity, and each score with the dense model's."""
    missed = told_miss(results)
    parts = [f"{100 * results['measured_sparsity']:.2f} % zeros" + (f" - {missed}" if missed else "")]
    if size := results.get("structure") and results["parameters"]:
        parts.append(f"{1 - size['left'] / size['dense']:.1%} of the parameters removed whole")
    scores = Scores.from_dict(results).scores
    dense = {score.path: score.value for score in Scores.from_dict(results.get("dense") or {}).scores}
    short = set_names(scores)
    for score in scores:
        if score.kind == "perplexity":
            before = f" (dense {value:.3f})" if (value := dense.get(score.path)) else ""
            value = "n/a" if score.value is None else f"{score.value:.3f}"
            parts.append(f"perplexity {short[score.name]}{score.under} {value}{before}")
    partly = partly_scored(scores)
    for score in main_scores(scores):
        beside = [partly[score.name]] if score.name in partly else []
        beside += [f"dense {value:.4f}"] if (value := dense.get(score.path)) else []
        parts.append(f"{score.label} {score.shown}" + (f" ({', '.join(beside)})" if beside else ""))
    return ", ".join(parts)


def show(outcomes: Sequence[Outcome], seconds: float | None = None) -> None:
    """For one job a line, on stderr for a failure, and what to do next; for several the comparison."""
    if len(outcomes) > 1:
        show_sweep(outcomes, seconds)
        return
    (outcome,) = outcomes
    where = outcome.log if outcome.exit_code else f" -> {outcome.folder}"
    stream = sys.stderr if outcome.exit_code else sys.stdout
    shown = outcome.brief if stream.isatty() and outcome.status == "done" else ""  # its scores are on the screen
    line = f"{outcome.status}: {shown or outcome.text}{where}"
    coloured = outcome.missed and stream.isatty() and not os.environ.get("NO_COLOR")
    print(f"\033[33m{line}\033[0m" if coloured else line, file=stream)
    if not outcome.exit_code and (outcome.folder / "results.json").is_file():
        for why, command in next_steps(outcome.folder, read_results(outcome.folder)):
            print(f"  {why:<10} {command}")
