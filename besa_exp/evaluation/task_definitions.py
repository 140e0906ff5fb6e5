"""Which tasks, groups and tags there are and what they take, read from YAML files by lm-eval's rules.

lm-eval itself takes 3 s to import and 25 s to read its 14,000 files; here it is 4 s, none at all for the tasks of
TASK_FOLDERS, and naming the folders of a task spares lm-eval the rest. As in lm-eval, files are read in the order of
their paths, the first of a name counts, a file inherits what it includes, and one's own folder (`include_path`) comes
before lm-eval's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from besa_exp.settings import EvaluatorSettings
from besa_exp.texts.embedded.text import TASK_NAME, TASKS_DIR

# The folder of each task's definition: lm-eval's own, relative to its tasks, or the package's. These are found without
# reading any other.
TASK_FOLDERS = {
    "piqa": "piqa",
    "boolq": "super_glue/boolq",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
    TASK_NAME: str(TASKS_DIR),
}
# Values of dataset_path that are no data set of the hub but a way to read files.
LOCAL_DATA = ("json", "csv", "parquet", "text", "arrow", "pandas", "xml", "generator", "imagefolder", "audiofolder")
NOT_READ = ("__pycache__", ".ipynb_checkpoints")


@dataclass(frozen=True)
class Definition:
    """A task, group or tag: its file (None for a tag, and for a task that stands within its group's file) and content;
    of a tag the `members`."""

    name: str
    kind: Literal["task", "group", "tag"]
    path: Path | None
    content: Mapping[str, Any] = field(default_factory=dict)
    members: tuple[str, ...] = ()

    @property
    def own_score(self) -> bool:
        """Whether lm-eval gives it a score: a tag has none, nor has a group that does not say how to average."""
        return self.kind == "task" or bool(self.content.get("aggregate_metric_list"))

    @property
    def is_local(self) -> bool:
        """Whether a task's data needs no hub: made by a function, or read from files of this machine."""
        place = str(self.content.get("dataset_path"))
        return "custom_dataset" in self.content or place in LOCAL_DATA or Path(place).expanduser().exists()


def tasks_root() -> Path | None:
    """The folder of lm-eval's own definitions; None: lm-eval is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) / "tasks" if folders else None


def find(name: str, include_path: str | None = None) -> Definition | None:
    """What a name stands for; None: nothing."""
    own, root = _own(include_path), tasks_root()
    if name in own or root is None:
        return own.get(name)
    return read_definitions(root / TASK_FOLDERS.get(name, "")).get(name)  # an absolute path stays as it is


def all_names(include_path: str | None = None) -> list[str]:
    root = tasks_root()
    return list(dict.fromkeys([*TASK_FOLDERS, *_own(include_path), *(read_definitions(root) if root else ())]))


def scored_names(settings: EvaluatorSettings) -> Iterator[str]:
    """The tasks and groups that get a score of their own, each once: a tag, or a group without an average, stands for
    its parts."""
    parts = (part for name in settings.tasks for part in _scored_parts(name, settings.include_path))
    yield from dict.fromkeys(parts)


def _scored_parts(name: str, include_path: str | None) -> Iterator[str]:
    definition = None if name in TASK_FOLDERS and not include_path else find(name, include_path)
    parts = list(_parts(definition, include_path)) if definition and not definition.own_score else []
    known = [part for part in parts if part.path is not None or part.kind == "tag"]
    if not parts or len(known) < len(parts):  # parts that have a name within their group alone
        yield name
        return
    for part in known:
        yield from _scored_parts(part.name, include_path)


def needed(name: str, include_path: str | None = None) -> list[Definition]:
    """The definition of `name` and of everything in it, tasks and groups; [] where there is none."""
    definition = find(name, include_path)
    found = _with_parts(definition, include_path) if definition else ()
    return list({(part.name, part.path): part for part in found}.values())


def _with_parts(definition: Definition, include_path: str | None) -> Iterator[Definition]:
    yield definition
    for part in _parts(definition, include_path):
        yield from _with_parts(part, include_path)


def _parts(definition: Definition, include_path: str | None) -> Iterator[Definition]:
    """What a group or a tag holds. What a group says for its parts stands in their content."""
    for name in definition.members:
        member = find(name, include_path)
        if member is not None and name != definition.name:
            yield member
    listed = definition.content.get("task") if definition.kind == "group" else None
    for item in listed if isinstance(listed, list) else ():
        given = item if isinstance(item, dict) else {"task": item}
        name = str(given.get("group") or given.get("task"))
        member = find(name, include_path) if name != definition.name else None
        if member is None:
            kind = "group" if isinstance(given.get("task"), list) else "task"
            yield Definition(name, kind, None, given)
        elif member.kind == "task":
            yield Definition(name, "task", member.path, {**member.content, **given})
        else:
            yield member


@cache
def read_definitions(root: Path) -> Mapping[str, Definition]:
    """Everything defined in the YAML files under `root`; files that cannot be read are passed over, as lm-eval does."""
    found: dict[str, Definition] = {}
    tags: dict[str, list[str]] = {}
    for path in sorted(root.glob("**/*.yaml"), key=lambda path: path.as_posix()):
        content = {} if any(part in NOT_READ for part in path.parts) else _content(path)
        kind: Literal["task", "group"] = "group" if "group" in content and "class" not in content else "task"
        name = content.get(kind)
        if not isinstance(name, str) or name in found:
            continue
        found[name] = Definition(name, kind, path, content)
        marks = content.get("tag") or [] if kind == "task" else []
        for tag in [marks] if isinstance(marks, str) else marks:
            tags.setdefault(str(tag), []).append(name)
    for tag, members in tags.items():
        found.setdefault(tag, Definition(tag, "tag", None, {}, tuple(sorted(members))))
    return found


def unreadable(root: Path) -> list[str]:
    """The YAML files under `root` that cannot be read, each with its reason."""
    found = []
    for path in sorted(root.glob("**/*.yaml")):
        try:
            _read(path)
        except (OSError, ValueError, yaml.YAMLError) as error:
            found.append(f"{path}: {' '.join(str(error).split())}")
    return found


def _content(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's keys with those that it includes; {} where it cannot be read. Its functions are left out."""
    try:
        own = _read(path)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    names = own.get("include") or []
    union: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names:
        inner = path.parent / str(name)
        union |= {} if inner in including else _content(inner, (*including, path))
    union.pop("task_list", None)
    return union | own


@cache
def _read(path: Path) -> dict[str, Any]:
    content = yaml.load(path.read_text(encoding="utf-8"), _Definitions)  # noqa: S506 - a safe loader
    if not isinstance(content, dict):
        raise ValueError("holds no keys")
    return content


def _own(include_path: str | None) -> Mapping[str, Definition]:
    return read_definitions(Path(include_path).expanduser()) if include_path else {}


class _Definitions(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads `!function` as None."""


_Definitions.add_multi_constructor("!", lambda *_: None)
