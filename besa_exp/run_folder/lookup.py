"""What a person means by a checkpoint: a run folder stands for the model in it, anything else for itself. No torch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from besa_exp.machine import atomic
from besa_exp.run_folder.status import is_done, read_status

YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where it is there


def run_and_model(checkpoint: str) -> tuple[Path | None, str]:
    """The run folder whose results describe `checkpoint`, None where no run made it, and the folder or hub id of its
    model. `checkpoint` may be the run folder, or `model` inside one. A dense run's model is the one it was given."""
    path = Path(checkpoint).expanduser()
    if read_status(path) is not None:
        return path, _dense_model(path) or str(path / "model")
    if path.name == "model" and is_done(path.parent):
        return path.parent, checkpoint
    return None, checkpoint


def check_run(run: Path) -> list[str]:
    """Why the model of this run cannot be scored, in complete sentences."""
    if not is_done(run):
        status = (read_status(run) or {}).get("status")
        return [f"checkpoint={run}: its run is not finished (status.json says {status}); finish or repeat it first"]
    if (run / "model").is_dir() or _dense_model(run):
        return []
    again = f"prune again with save.model=true overwrite=true hydra.run.dir={run}"
    masks = run / "masks.safetensors"
    if not masks.is_file():
        return [f"checkpoint={run}: its run kept neither model nor masks; {again}"]
    rebuild = shlex.join(["besa", "masks", "apply", str(masks), *_dense(run), "--out", str(run / "model")])
    return [
        f"checkpoint={run}: its run kept masks alone; rebuild the model with `{rebuild}` (where the method leaves the "
        f"kept weights as they were), or {again}"
    ]


def _dense_model(run: Path) -> str | None:
    """The path of the model that a dense run scored, where that names it; None: another run's, or one with a copy."""
    results, model = atomic.read_json(run / "results.json") or {}, read_group(run, "model")
    alone = results.get("pruner") == "dense" and not model.get("revision") and not (run / "model").is_dir()
    return str(model["path"]) if alone and "path" in model else None


def _dense(run: Path) -> list[str]:
    """The dense model as the run's configuration names it, for a command line."""
    model = read_group(run, "model")
    revision = model.get("revision")
    return ["--model", str(model.get("path", "DENSE_MODEL")), *(["--revision", str(revision)] if revision else [])]


def read_config(run: Path) -> dict[str, Any]:
    """What a run was asked, by its config.yaml; {} where that is not there or damaged."""
    try:
        text = (run / "config.yaml").read_text(encoding="utf-8")
        found = yaml.load(text, YAML_LOADER)  # noqa: S506 - the safe one
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def read_group(run: Path, name: str) -> dict[str, Any]:
    """The keys of one group of it; {} where it says nothing of the group."""
    group = read_config(run).get(name)
    return group if isinstance(group, dict) else {}
