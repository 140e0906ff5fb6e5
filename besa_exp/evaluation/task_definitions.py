"""What lm-eval's own definitions say of a task, read from its YAML files: lm-eval itself takes seconds to import."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import yaml

from besa_exp.errors import ConfigurationError
from besa_exp.evaluation.checks import TASK_FOLDERS


def data_set_of(task: str) -> tuple[str, str | None]:
    """The hub's data set of a task, and the configuration of it. ConfigurationError: lm-eval does not say."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(f"evaluator.tasks={task}: lm-eval is not installed; pip install 'lm-eval[hf]>=0.4.13'")
    folder = Path(spec.submodule_search_locations[0]) / "tasks" / TASK_FOLDERS[task]
    for path in sorted(folder.glob("*.yaml")):
        definition = _definition(path)
        if definition.get("task") == task:
            return definition["dataset_path"], definition.get("dataset_name")
    raise ConfigurationError(f"evaluator.tasks={task}: the installed lm-eval does not define it in {folder}")


def _definition(path: Path) -> dict[str, Any]:
    """One of lm-eval's YAML files with what it includes; its functions are left out."""
    own = yaml.load(path.read_text(encoding="utf-8"), _Definitions)  # noqa: S506 - a SafeLoader
    included = own.get("include", []) if isinstance(own, dict) else []
    names = [included] if isinstance(included, str) else included
    union: dict[str, Any] = {}
    for name in names:
        union |= _definition(path.parent / name)
    return union | own if isinstance(own, dict) else union


class _Definitions(yaml.SafeLoader):
    """Reads `!function` as None."""


_Definitions.add_multi_constructor("!", lambda *_: None)
