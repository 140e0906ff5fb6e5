"""lm-eval's tasks and groups, loaded by its own manager, their questions from the hub, a local mirror or a function.

lm-eval's own definitions are used: prompts, metrics and versions are never changed. With a local mirror only the
place the documents come from is replaced. Import this module inside functions: it loads lm-eval and datasets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.tasks._yaml_loader import load_yaml

from besa_exp.errors import Unavailable, as_unavailable, first_line
from besa_exp.evaluation.task_definitions import Definition, needed
from besa_exp.evaluation.task_questions import check_questions
from besa_exp.hub.client import hub_problem, offline_hub
from besa_exp.settings import EvaluatorSettings
from besa_exp.texts.files import FORMATS, format_of, rows
from besa_exp.texts.sources import file_sha256


@dataclass(frozen=True)
class LoadedTasks:
    """What a name stands for: its `tasks` by name, the groups above them, as lm-eval's `evaluate` takes them, where the
    questions come from, and how many of them have no answer that a model could give."""

    tasks: dict[str, Any]
    groups: dict[str, Any]
    group_map: dict[str, list[str]]
    data: str
    unanswerable: int = 0


@dataclass(frozen=True)
class _Mirror:
    """Of one task: the keys that replace its own; the questions that are scored, with their file and lines."""

    keys: dict[str, Any]
    path: Path
    lines: list[int]
    documents: datasets.Dataset


def load_task(name: str, settings: EvaluatorSettings, offline: bool) -> LoadedTasks:
    """The task or group `name`, its few-shot number set. Unavailable: its questions cannot be loaded or scored."""
    with as_unavailable():
        parts = needed(name, settings.include_path)
        if not parts:
            raise Unavailable("the installed lm-eval defines no such task, group or tag")
        leaves = [part for part in parts if part.kind == "task"]
        mirrors = {leaf.name: mirror for leaf in leaves if (mirror := _mirror(leaf, settings))}
        manager = _manager(parts, settings.include_path)
        for leaf, mirror in mirrors.items():
            _put_in_place(manager, leaf, mirror)
        local = {leaf.name for leaf in leaves if leaf.is_local} | set(mirrors)
        loaded = _loaded(manager, name, offline, from_hub=len(local) < len(leaves))
        unanswerable = 0
        for task_name, task in loaded["tasks"].items():
            _set_shots(task, settings.num_fewshot)
            mirror = mirrors.get(task_name)
            source = (str(mirror.path), mirror.lines) if mirror else None
            unanswerable += check_questions(task, source, settings.limit, strict=task_name in local)
    groups, group_map = loaded.get("groups", {}), loaded.get("group_map", {})
    return LoadedTasks(loaded["tasks"], groups, group_map, _data(leaves, mirrors), unanswerable)


def _put_in_place(manager: Any, name: str, mirror: _Mirror) -> None:
    """Lets the manager make the task `name` with the mirror's keys. Unavailable: a row that the task's own preparation
    cannot take."""
    entry = manager.task_index[name]
    content = {**load_yaml(entry.yaml_path, resolve_func=True), **mirror.keys}
    manager.task_index[name] = replace(entry, yaml_path=None, cfg=content)
    prepare = content.get("process_docs")
    if not callable(prepare):
        return
    try:
        prepare(mirror.documents)
    except Exception:  # a task's own code
        for place, number in enumerate(mirror.lines):
            try:
                prepare(mirror.documents.select([place]))
            except Exception as error:
                raise Unavailable(
                    f"{mirror.path}, line {number}: {name} cannot use it ({first_line(error)})"
                ) from error
        raise


def _manager(parts: Sequence[Definition], include_path: str | None) -> Any:
    """lm-eval's manager over the folders of these definitions alone. Of two folders the later one wins there, while in
    the whole tree the first does."""
    own = Path(include_path).expanduser() if include_path else None
    found = {part.path.parent for part in parts if part.path and not (own and part.path.is_relative_to(own))}
    outer = [folder for folder in found if not any(other in folder.parents for other in found)]
    folders = sorted(outer, key=lambda folder: f"{folder.as_posix()}/", reverse=True)
    return lm_eval.tasks.TaskManager(include_path=[*folders, *([own] if own else [])], include_defaults=False)


def _loaded(manager: Any, name: str, offline: bool, from_hub: bool) -> Any:
    """What the manager makes of the name; `from_hub`: something is to be fetched. Unavailable with the reason."""
    silent = hub_problem() if from_hub and not offline else None
    try:
        with offline_hub((offline and from_hub) or silent is not None):
            return manager.load([name])
    except Exception as error:  # whatever a library raises where data is away or not what the prompts need
        remedy = "; set evaluator.data_dir, or run once with a network and offline=false" if from_hub else ""
        remedy = remedy or "; its rows must have the keys that the task's prompt names"
        why = f"the hub cannot be reached: {silent}" if silent else first_line(error)
        raise Unavailable(f"its data cannot be loaded ({why}){remedy}") from error


def _set_shots(task: Any, asked: int | None) -> None:
    """lm-eval's rule: as asked, but a task that says 0 itself keeps it, and one that says nothing has 0."""
    own = task.get_config("num_fewshot")
    if own is None or (asked is not None and own != 0):
        task.set_config("num_fewshot", asked or 0)


def _mirror(leaf: Definition, settings: EvaluatorSettings) -> _Mirror | None:
    """The keys that point a task at `data_dir`/TASK/SPLIT.jsonl; None: there is no mirror, or a task that needs no hub
    is not in it. Unavailable: it lacks a file, or cannot stand in."""
    definition, folder = leaf.content, Path(settings.data_dir or "").expanduser() / leaf.name
    if settings.data_dir is None or (leaf.is_local and not folder.is_dir()):
        return None
    if leaf.path is None or "class" in definition:
        raise Unavailable(
            f"{leaf.name} is made by code of lm-eval's, which reads no local mirror; unset evaluator.data_dir"
        )
    splits = {key: definition.get(key) for key in ("training_split", "validation_split", "test_split")}
    scored = splits["test_split"] or splits["validation_split"]
    if scored is None:
        raise Unavailable(f"{leaf.name} names neither a test nor a validation split")
    fewshot = definition.get("fewshot_config") or {}
    shown = fewshot.get("split") or definition.get("fewshot_split")
    source = shown or (None if fewshot.get("samples") else splits["training_split"] or splits["validation_split"])
    own = definition.get("num_fewshot")
    shots = own if own == 0 or settings.num_fewshot is None else settings.num_fewshot
    paths = {split: _split_file(folder, split) for split in {scored, *([source] if shots and source else [])}}
    read = {split: _read(path) for split, path in paths.items()}
    documents = {split: document for split, (document, _) in read.items()}
    keys: dict[str, Any] = {key: split if split in documents else None for key, split in splits.items()}
    keys["custom_dataset"] = lambda **_: documents  # lm-eval calls it with the task's metadata
    if shown not in documents:
        keys["fewshot_split"] = None
        keys |= {"fewshot_config": {k: v for k, v in fewshot.items() if k != "split"}} if "split" in fewshot else {}
    return _Mirror(keys, paths[scored], read[scored][1], documents[scored])


def _split_file(folder: Path, split: str) -> Path:
    """`folder`/SPLIT with any ending of rows that can be read. Unavailable: there is none, or more than one."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [f for f in files if f.name.startswith(f"{split}.") and format_of(f.name) in ("lines", "parquet")]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(file.name for file in found)
        raise Unavailable(f"{folder} has {names}, and either could be meant; remove one")
    raise Unavailable(
        f"evaluator.data_dir has no {folder / split}.jsonl (nor {', '.join(FORMATS)} of that name); add the file, or "
        "unset evaluator.data_dir for the hub"
    )


def _read(path: Path) -> tuple[datasets.Dataset, list[int]]:
    """A split's rows and the number of each; a key that only some have is null in the others."""
    numbered = list(rows(path))
    if not numbered:
        raise Unavailable(f"{path} holds no questions")
    content = [row for _, row in numbered]
    names = dict.fromkeys(name for row in content for name in row)
    try:
        document = datasets.Dataset.from_dict({name: [row.get(name) for row in content] for name in names})
    except Exception as error:  # pyarrow's kinds of not fitting
        raise Unavailable(f"{path}{_odd_row(numbered)}: its rows are not of one form ({first_line(error)})") from error
    return document, [number for number, _ in numbered]


def _odd_row(numbered: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    """`, line 3 ('label' is str, not int as in line 1)` of the first row that differs from one before it."""
    first: dict[str, tuple[int, str]] = {}
    for number, row in numbered:
        for name, value in row.items():
            kind = type(value).__name__
            before = first.setdefault(name, (number, kind)) if value is not None else (number, kind)
            if before[1] != kind:
                return f", line {number} ({name!r} is {kind}, not {before[1]} as in line {before[0]})"
    return ""


def _data(leaves: Sequence[Definition], mirrors: Mapping[str, _Mirror]) -> str:
    """Where the questions come from, for the record: a mirror's files with their hash."""
    sources = []
    for leaf in leaves:
        if leaf.name in mirrors:
            path = mirrors[leaf.name].path
            sources.append(f"{path.parent.parent.name}/{path.parent.name}/{path.name} sha256:{file_sha256(path)}")
        elif leaf.path is None or not leaf.is_local:
            sources.append(f"hub: {leaf.content.get('dataset_path')}")
        else:
            sources.append("embedded" if "custom_dataset" in leaf.content else f"local: {leaf.path.name}")
    found = sorted(set(sources))
    if len(found) == 1:
        return found[0]
    return f"{len(found)} sources sha256:{hashlib.sha256(chr(10).join(found).encode()).hexdigest()}"
