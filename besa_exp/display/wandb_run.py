"""The W&B run of a run folder: how it is opened, and found again after a restart by the id that the folder keeps."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from besa_exp.machine import atomic
from besa_exp.machine.environment import masked, without_folders
from besa_exp.settings import TrackerSettings

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT = 60.0  # seconds
FINISH_TIMEOUT = 300.0  # seconds for the upload at the end; what was not sent stays in the run folder
ID = re.compile(rb"[0-9A-Za-z_-]+")
STEP_METRICS = {"step/*": "optimisation_step", "block/*": "block", "allocated/*": "block", "rows/*": "block"}
STEP_METRICS |= {"recovery/*": "recovery_step"}
PACKAGES = ("besa-exp", "torch", "transformers", "lm-eval")  # whose versions the config tells


def start_run(
    settings: TrackerSettings, folder: Path, config: Mapping[str, Any], run_name: str, pruner: str
) -> wandb.Run:
    """A new run, or the run that the folder already has. Raises what W&B raises where neither can be opened."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read at import: no crash reports over the network
    import wandb

    if settings.mode == "offline":
        _remove_unsent(folder / "wandb")
    wandb.setup(wandb.Settings(silent=True))  # no lines of its own, and no question for an API key
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        group=settings.group,
        tags=[*settings.tags, pruner],
        name=os.environ.get("WANDB_NAME") or run_name,
        id=_run_id(folder / "wandb"),
        resume="allow",
        job_type=os.environ.get("WANDB_JOB_TYPE") or "prune",
        config=_config(folder, config, pruner),
        reinit="create_new",
        settings=_wandb_settings(settings, folder),
    )
    for metric, step_metric in STEP_METRICS.items():
        run.define_metric(step_metric, hidden=True)
        run.define_metric(metric, step_metric=step_metric, summary="none")  # the last of a curve is no result
    run.define_metric("step/block", step_metric="optimisation_step", summary="none", hidden=True)
    return run


def _config(folder: Path, config: Mapping[str, Any], pruner: str) -> dict[str, Any]:
    """The request, its secrets masked and its folders left out, with the method's name, and of the run folder's files
    the command, versions, commit and device."""
    shown = _without_classes(without_folders(masked(config))) | {"method": pruner}
    if isinstance(model := shown.get("model"), dict) and "path" in model:
        shown["model"] = model | {"name": model.get("name") or str(model["path"]).rstrip("/").rpartition("/")[2]}
    where, status = (atomic.read_json(folder / name) or {} for name in ("environment.json", "status.json"))
    shown |= {"command": without_folders(status["command"])} if status.get("command") else {}
    shown |= {"commit": where["git_commit"], "device_name": where["device_name"]} if where else {}
    versions = {name: where["packages"].get(name) for name in PACKAGES} if where else {}
    return shown | ({"versions": {"python": where["python"], **versions}} if versions else {})


def _without_classes(values: Any) -> Any:
    """Without the Python paths of the method's parts."""
    if not isinstance(values, Mapping):
        return values
    return {key: _without_classes(value) for key, value in values.items() if key != "_target_"}


def _wandb_settings(asked: TrackerSettings, folder: Path) -> wandb.Settings:
    """Everything inside `folder`, nothing about packages, code or git state, no output captured; the machine's load
    where it is asked for."""
    import wandb

    return wandb.Settings(
        mode=asked.mode,  # pyright: ignore[reportArgumentType] - checked there
        root_dir=str(folder.absolute()),  # its service may have begun in another working folder
        silent=True,
        console="off",
        host="",
        disable_git=True,
        disable_code=True,
        save_code=False,
        symlink=False,
        allow_offline_artifacts=False,  # their files would lie outside the run folder
        x_save_requirements=False,
        x_disable_stats=not asked.system_metrics,
        x_disable_meta=True,
        x_disable_machine_info=not asked.system_metrics,
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH_TIMEOUT,
    )


def _remove_unsent(folder: Path) -> None:
    """What earlier attempts of this run logged offline, unless `wandb sync` has sent it."""
    for attempt in folder.glob("offline-run-*"):
        if not any(attempt.glob("*.synced")):
            atomic.remove(attempt)


def _run_id(folder: Path) -> str:
    """The id kept in `folder`; a new one at first, or where the file is damaged. Not drawn from a generator that a seed
    governs."""
    path = folder / "run_id"
    kept = path.read_bytes() if path.exists() else b""
    if not ID.fullmatch(kept):
        kept = secrets.token_hex(6).encode()
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, kept.decode())
    return kept.decode()


def forget_run(folder: Path) -> None:
    (folder / "wandb" / "run_id").unlink(missing_ok=True)
