"""What a run takes from the Hugging Face hub, whether the local caches hold it, and how it gets there.

The caches are the libraries' own, looked into and filled by their own functions: models and single files lie in
huggingface_hub's cache (HF_HUB_CACHE), the data of lm-eval's tasks, prepared, in that of datasets (HF_DATASETS_CACHE).
Nothing here imports torch; the hub's client and datasets are imported when something of theirs is asked for.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from besa_exp.checkpoints.fetch import fetched_model
from besa_exp.checkpoints.inspect import inspect_model_folder
from besa_exp.errors import ConfigurationError, Unavailable, first_line
from besa_exp.evaluation.task_definitions import needed
from besa_exp.hub.client import NOT_CACHED, is_hub_id, offline_hub
from besa_exp.settings import CalibrationSettings, EvaluatorSettings, ModelSettings, RecoverySettings
from besa_exp.texts.sources import HUB_FILES, TASK_FILES, Use, commit_of, fetch, fetched

Kind = Literal["model", "calibration", "perplexity", "task", "recovery"]


@dataclass(frozen=True)
class Need:
    """One thing of the hub that a run needs: a model (`convert`: pickled weights too, where it has no others), one file
    of a data set, or a task's data set (`config` of it), defined in lm-eval or in `include_path`. `name` is what a
    person calls it."""

    kind: Kind
    name: str
    repository: str
    revision: str | None = None
    filename: str | None = None
    config: str | None = None
    include_path: str | None = None
    convert: bool = False


@dataclass(frozen=True)
class Held:
    """Where a cache holds it: the folder or file, the commit where that is known, and bytes by file."""

    where: Path
    commit: str | None
    files: dict[str, int]


def needs_of(
    model: ModelSettings | None,
    calibration: CalibrationSettings | None,
    evaluator: EvaluatorSettings | None,
    recovery: RecoverySettings | None = None,
) -> list[Need]:
    """All that these settings take from the hub, without what they take from this machine. None: not to be looked at,
    as where it is refused already."""
    needs = []
    if model is not None and is_hub_id(model.path):
        needs.append(Need("model", model.path, model.path, model.revision, convert=model.convert))
    if calibration is not None and (source := calibration.path or calibration.name) in HUB_FILES:
        needs.append(_file_of(source, "calibration"))
    if evaluator is not None:
        needs += [_file_of(name, "perplexity") for name in evaluator.perplexity_sets if name in HUB_FILES]
        needs += [need for task in evaluator.tasks for need in _task_data(task, evaluator)]
    if recovery is not None and recovery.path is None and (wanted := TASK_FILES.get(recovery.task or "")):
        needs.append(Need("recovery", str(recovery.task), wanted.repository, wanted.revision, wanted.filename))
    return list(dict.fromkeys(needs))


def held(need: Need) -> Held:
    """Where it lies, found without any connection. Unavailable: why it is not there, or not whole."""
    if need.kind == "model":
        return _held_model(need)
    if need.kind == "task":
        return _held_task(need)
    from huggingface_hub import try_to_load_from_cache

    assert need.filename is not None
    found = try_to_load_from_cache(need.repository, need.filename, revision=need.revision, repo_type="dataset")
    if not isinstance(found, str):
        raise Unavailable(NOT_CACHED)
    return Held(Path(found), commit_of(Path(found)), {need.filename: Path(found).stat().st_size})


def bring(need: Need) -> None:
    """Downloads what is not in the caches. Unavailable: it cannot be fetched."""
    if need.kind == "model":
        _fetched(need, offline=False)
    elif need.kind == "task":
        from besa_exp.evaluation.task_loading import load_task  # lm-eval's own way to it

        load_task(need.name, EvaluatorSettings("prefetch", include_path=need.include_path), offline=False)
    elif need.kind == "recovery":
        fetched(TASK_FILES[need.name], need.name, offline=False)
    else:
        fetch(need.name, need.kind, offline=False)


def missing_offline(needs: Sequence[Need]) -> list[str]:
    """One sentence that names all that is not in the caches and the command that fetches it; nothing where all is."""
    missing = []
    for need in needs:
        try:
            held(need)
        except Unavailable:
            missing.append(need)
    if not missing:
        return []
    named = "; ".join(described(need) for need in missing)
    return [
        f"offline=true, and not in the local caches: {named}; fetch what is missing where there is a network: "
        f"{prefetch_command(missing)}"
    ]


def described(need: Need) -> str:
    """`calibration c4 (en/... of allenai/c4)`."""
    what = {"perplexity": "perplexity set", "recovery": "task to learn"}.get(need.kind, need.kind)
    part = need.filename or need.config
    source = f"{part} of {need.repository}" if part else need.repository
    revision = f", revision {need.revision}" if need.revision else ""
    return f"{what} {need.name}" + (revision if need.name == need.repository else f" ({source}{revision})")


def prefetch_command(needs: Sequence[Need]) -> str:
    """The command that fetches these and nothing else."""
    words = ["besa", "prefetch"]
    for need in needs:
        if need.kind == "model":
            words += [f"model.path={need.name}", *([f"model.revision={need.revision}"] if need.revision else [])]
            words += ["model.convert=true"] if need.convert else []
        elif need.kind == "calibration":
            words.append(f"calibration={need.name}")
        elif need.kind == "recovery":
            words += ["recovery=full", f"recovery.task={need.name}"]
    words.append("evaluator=none")
    for kind, key in (("perplexity", "perplexity_sets"), ("task", "tasks")):
        if names := [need.name for need in needs if need.kind == kind]:
            words.append(f"evaluator.{key}=[{','.join(names)}]")
    words += [f"evaluator.include_path={path}" for path in dict.fromkeys(need.include_path for need in needs) if path]
    return shlex.join(words)


def _file_of(name: str, use: Use) -> Need:
    wanted = HUB_FILES[name][use]
    return Need(use, name, wanted.repository, wanted.revision, wanted.filename)


def _task_data(name: str, evaluator: EvaluatorSettings) -> Iterator[Need]:
    """The data sets of a task, or of all tasks in a group or a tag; none where a local mirror stands in."""
    for leaf in needed(name, evaluator.include_path):
        place, config = leaf.content.get("dataset_path"), leaf.content.get("dataset_name")
        if leaf.kind == "task" and place is not None and not leaf.is_local and evaluator.data_dir is None:
            own = evaluator.include_path if evaluator.include_path and leaf.path is not None else None
            yield Need("task", leaf.name, str(place), config=config, include_path=own)


def _fetched(need: Need, offline: bool) -> Path:
    """The folder of a model's files. What the config says against it is raised when it is loaded."""
    try:
        settings = ModelSettings(
            need.name, need.repository, need.revision, trust_remote_code=True, convert=need.convert
        )
        return fetched_model(settings, offline)
    except ConfigurationError as error:
        raise Unavailable(str(error)) from error


def _held_model(need: Need) -> Held:
    folder = _fetched(need, offline=True)
    _, problems = inspect_model_folder(folder, convert=True, trust_remote_code=True)  # is it whole? no more is asked
    if problems:
        raise Unavailable("; ".join(problems))
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return Held(folder, commit_of(folder), dict(sorted(files.items())))


def _held_task(need: Need) -> Held:
    import datasets

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()  # it warns that it uses its cache, which is what is wanted
    try:
        with offline_hub():
            builder = datasets.load_dataset_builder(need.repository, need.config)
    except Exception as error:  # a data set that is a script raises RuntimeError, and each format its own
        raise Unavailable(NOT_CACHED if isinstance(error, OSError) else first_line(error)) from error
    finally:
        datasets.logging.set_verbosity(level)
    folder = Path(builder.cache_dir)
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.arrow"))}
    if not files:
        raise Unavailable(f"{folder} holds no prepared data")
    commit = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None  # datasets names it so
    return Held(folder, commit, files)
