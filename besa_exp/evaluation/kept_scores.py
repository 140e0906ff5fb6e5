"""Scores that are kept on the disk, so that nothing is measured twice.

Of one run: each set and task as it is finished, so that an evaluation goes on where it stopped. Of a dense model: all
of them, for all runs whose folders lie side by side, also while they run.

`.dense_scores/<hash>.json` beside the run folders holds them with the key that they were measured under: everything
that determines them. A run that needs scores which are not there locks `<hash>.lock` and computes them; the others
wait. Incomplete scores are not kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from besa_exp.evaluation.score import Scores
from besa_exp.evaluation.task_definitions import TASK_FOLDERS
from besa_exp.machine import atomic, distributed
from besa_exp.machine.environment import version_of
from besa_exp.settings import EvaluatorSettings

if TYPE_CHECKING:
    from besa_exp.checkpoints.load import LoadedModel

FOLDER = ".dense_scores"
MEASURED_BY = ("besa-exp", "torch", "transformers", "tokenizers", "datasets", "lm-eval")


@dataclass(frozen=True)
class FinishedScores:
    """scores.json of a run folder: {which model: {kind: {set or task: request and result}}}. Of several ranks the first
    reads it for all, and writes it. `keep_spent` is called before each score is kept. `given` joins each request."""

    path: Path
    which: str
    keep_spent: Callable[[], None] = lambda: None
    given: Mapping[str, Any] = field(default_factory=dict)

    def find(self, kind: str, name: str, request: dict[str, Any]) -> Any | None:
        """What was measured under the same `request`; None: nothing."""
        found = distributed.from_first(lambda: self._read().get(self.which, {}).get(kind, {}).get(name))
        asked = json.loads(json.dumps({**request, **self.given}))
        return found["result"] if found and found["request"] == asked else None

    def keep(self, kind: str, name: str, request: dict[str, Any], result: Any) -> None:
        if not distributed.is_first():
            return
        content = self._read()
        content.setdefault(self.which, {}).setdefault(kind, {})[name] = {
            "request": {**request, **self.given},
            "result": result,
        }
        self.keep_spent()
        atomic.write_text(self.path, json.dumps(content) + "\n")

    def _read(self) -> dict[str, Any]:
        return atomic.read_json(self.path) or {}


def shared_dense_scores(
    folder: Path, key: Mapping[str, Any], compute: Callable[[], Scores], on_wait: Callable[[], None]
) -> tuple[Scores, bool]:
    """The scores, and whether they were measured before. `on_wait` is called when another run is measuring them.

    Where `folder` cannot be written to, they are computed."""
    wanted = json.loads(json.dumps(key))
    path = folder / f"{hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]}.json"
    with atomic.alone(path.with_suffix(".lock"), on_wait):
        if found := _read(path, wanted):
            return found, True
        scores = compute()
        if not scores.unavailable:
            entry = {"key": wanted, "scores": {**scores.to_dict(), "provenance": scores.provenance}}
            with suppress(OSError):  # the scores are there; the next run measures them again
                atomic.write_text(path, json.dumps(entry, indent=1) + "\n")
        return scores, False


def dense_key(
    loaded: LoadedModel,
    settings: EvaluatorSettings,
    seed: int,
    deterministic: bool,
    device: torch.device,
    skipping: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that determines the scores; `skipping`: what a policy is decided from. Files are identified by name,
    size and time of change, as reading them all would take longer than many an evaluation; the seed matters where
    examples are, or may be, drawn."""
    local = [*settings.perplexity_sets, *(place for place in (settings.data_dir, settings.include_path) if place)]
    paths = [Path(name).expanduser() for name in local]
    drawn = settings.num_fewshot or any(task not in TASK_FOLDERS for task in settings.tasks)
    evaluator = {key: value for key, value in asdict(settings).items() if key not in ("name", "dense")}
    return {
        "model": {"path": str(loaded.folder.resolve()), "files": files_of(loaded.folder, "*")},
        "dtype": str(loaded.model.dtype),
        "streamed": loaded.weights is not None,
        "evaluator": evaluator | {"seed": seed if drawn else None},
        "data": {str(path.resolve()): files_of(path) for path in paths if path.exists()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "deterministic": deterministic,
        "versions": {name: version_of(name) for name in MEASURED_BY},
        "code": files_of(Path(__file__).parent),
        **({"skipping": dict(skipping)} if skipping else {}),
    }


def files_of(place: Path, pattern: str = "**/*") -> list[list[Any]]:
    """Name, size and time of change of a file, or of the files in a folder; links are followed."""
    files = [place] if place.is_file() else sorted(path for path in place.glob(pattern) if path.is_file())
    found = [(file, file.stat()) for file in files if file.suffix != ".pyc"]
    root = place.parent if place.is_file() else place
    return [[str(file.relative_to(root)), stat.st_size, stat.st_mtime_ns] for file, stat in found]


def _read(path: Path, key: Mapping[str, Any]) -> Scores | None:
    """What was kept under the key; None: nothing, or nothing that can be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Scores.from_dict(content["scores"]) if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
