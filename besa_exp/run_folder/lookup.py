"""What a person means by a checkpoint: a run folder stands for the model in it, anything else for itself. No torch."""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml

from besa_exp.machine import atomic
from besa_exp.run_folder.status import is_done, read_status


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
    results, words = atomic.read_json(run / "results.json") or {}, _dense(run)
    return words[1] if results.get("pruner") == "dense" and len(words) == 2 and not (run / "model").is_dir() else None


def _dense(run: Path) -> list[str]:
    """The dense model as the run's configuration names it, for a command line."""
    try:
        model = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]
        revision = model.get("revision")
        return ["--model", str(model["path"]), *(["--revision", str(revision)] if revision else [])]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return ["--model", "DENSE_MODEL"]
