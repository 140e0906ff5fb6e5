"""What Hydra's launchers leave open: how many jobs at once, how long, and jobs whose worker was lost.

Nothing here needs the launchers to be installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from besa_exp.errors import first_line

CORES_OF_A_JOB = 4  # at most that many are well used by the small models that are pruned on a CPU


WEEK = 7 * 24 * 60  # minutes


def launcher_of(config: DictConfig) -> str:
    """The class that starts a sweep's jobs, in a configuration with Hydra's node."""
    return str(OmegaConf.select(config, "hydra.launcher._target_"))


def launcher_lines(config: DictConfig) -> list[str]:
    """Override lines for keys of the launcher that still have its plugin's own value, where that does not suit us.

    joblib starts as many jobs as there are cores, each with all of them; submitit ends jobs after an hour, and Slurm
    does not queue them again, although a run goes on where it stopped."""
    better = {
        "JoblibLauncher": {
            "n_jobs": (-1, jobs_at_once()),
            "batch_size": ("auto", 1),
            "pre_dispatch": ("2*n_jobs", "all"),
        },
        "LocalLauncher": {"timeout_min": (60, WEEK)},
        "SlurmLauncher": {"max_num_timeout": (0, 20)},
    }
    launcher = config.hydra.launcher
    keys = better.get(launcher_of(config).rsplit(".", 1)[-1], {})
    return [f"hydra.launcher.{key}={ours}" for key, (theirs, ours) in keys.items() if launcher.get(key) == theirs]


def visible_gpus() -> list[str]:
    """The GPUs a job may be given, as CUDA_VISIBLE_DEVICES names them; asked without starting CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    present = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(present.iterdir())))] if present.is_dir() else []


def jobs_at_once() -> int:
    """How many jobs fill this machine: one for each GPU; without one, a job for every few cores, at least two."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return len(visible_gpus()) or max(2, cores // CORES_OF_A_JOB)


@contextmanager
def lost_jobs_told(target: str) -> Iterator[None]:
    """submitit's launcher raises for the first job whose worker was lost and forgets all others, which may still run.
    For as long as this lasts such a job returns the reason, a text, and the others are waited for."""
    if "submitit" not in target:
        yield
        return
    from submitit.core.core import Job  # type: ignore[import-not-found] # an extra

    own = Job.results

    def results(job: Job) -> list[object]:
        try:
            return own(job)
        except Exception as error:  # noqa: BLE001 - whatever became of it, it is this job's failure alone
            returned = JobReturn(status=JobStatus.COMPLETED)
            returned.return_value = f"{first_line(error)}; see {job.paths.stdout}"
            return [returned]

    Job.results = results  # type: ignore[method-assign]
    try:
        yield
    finally:
        Job.results = own  # type: ignore[method-assign]
