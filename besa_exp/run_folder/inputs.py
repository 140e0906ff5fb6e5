"""What a run has read from this machine, so that a finished run is the answer to its inputs and not to their paths.

`inputs.json` of the run folder holds for each key that names a place (`model.path`, `calibration.path`, a perplexity
set, a task of the mirror, a method that is not the package's own) size, time of change and a hash of its files, as they
were when the run began; and for `checkpoint` those of the model that the run's scores are of. Sizes and times are
compared first; a file that is small, or whose time alone has changed, by its hash. Folders from before this file was
written have none, and are taken as they are. No torch here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from besa_exp.evaluation.task_definitions import needed
from besa_exp.machine import atomic
from besa_exp.presets import METHOD_GROUPS
from besa_exp.run_folder.identity import method_described
from besa_exp.run_folder.lookup import run_and_model
from besa_exp.run_folder.status import is_done
from besa_exp.settings import EvaluationSettings, EvaluatorSettings, ModelSettings, RunSettings
from besa_exp.texts.embedded.text import MODEL_DIR

NAME = "inputs.json"
SMALL = 2**24  # bytes; always compared by its hash
HASHED_WHOLE = 2**28  # bytes; of a larger file, pieces at equal distances are hashed
PIECES, PIECE = 256, 2**16
OF_A_MODEL = (".safetensors", ".bin", ".json", ".model", ".txt", ".py", ".tiktoken", ".jinja")
WEIGHTS = (".safetensors", ".bin", ".index.json")  # a further one of these changes a model, any other file does not


class Input(NamedTuple):
    """Files of this machine that a run reads, by name. `key` is theirs in inputs.json, `said` what a person gave."""

    key: str
    said: str
    files: dict[str, Path]


def inputs_of(settings: RunSettings | EvaluationSettings) -> list[Input]:
    """What the keys mean on this machine; one that means nothing here is left out."""
    if isinstance(settings, RunSettings):
        path, reads = settings.model.path, True
        found = [Input("model.path", f"model.path={path}", _model_files(settings.model))]
        found += [Input(group, f"the code of {group}", _own_code(getattr(settings, group))) for group in METHOD_GROUPS]
        found += _given("recovery.path", _tuned_on(settings.recovery))
    else:
        reads = settings.skipping is not None and settings.skipping.is_calibrated
        found = [_checkpoint(settings.checkpoint, settings.model)]
    if reads and settings.calibration:
        found += _given("calibration.path", settings.calibration.path)
    found += {one.key: one for one in _scored(settings.evaluator)}.values()  # tasks may share a part
    return [one for one in found if one.files]


def _checkpoint(said: str, model: ModelSettings) -> Input:
    return Input("checkpoint", f"checkpoint={said}", _model_files(model))


def _given(key: str, path: str | None) -> list[Input]:
    return [Input(key, f"{key}={path}", _one(path))] if path else []


def _own_code(method: Any) -> dict[str, Path]:
    """The files of a method's classes that are not the package's own; the method may stand there as plain values."""
    names = {target.rpartition(".")[0] for target in _targets(method_described(method))}
    found: dict[str, Path] = {}
    for name in sorted(name for name in names if name.partition(".")[0] not in ("", "__main__", "besa_exp")):
        with suppress(ImportError, ValueError):  # what cannot be imported is told elsewhere
            spec = find_spec(name)
            found |= {f"{name}.py": Path(spec.origin)} if spec and spec.has_location and spec.origin else {}
    return found


def _targets(values: Any) -> Iterator[str]:
    """Each `_target_` in plain values."""
    for key, value in values.items() if isinstance(values, Mapping) else ():
        yield from [str(value)] if key == "_target_" else _targets(value)


def _tuned_on(recovery: Any) -> str | None:
    """The text of a recovery, which may stand there as plain values."""
    return recovery.get("path") if isinstance(recovery, Mapping) else getattr(recovery, "path", None)


def fingerprint(settings: RunSettings | EvaluationSettings) -> dict[str, Any]:
    """{key: {name: {size, modified, sha256}}} of the inputs as they are now."""
    return _fingerprints(inputs_of(settings))


def fingerprint_of_run(folder: Path) -> dict[str, Any]:
    """The same of the model that `checkpoint=FOLDER` means, so that a run's scores are never taken for those of a model
    that was tuned, or put, in its place; {} where the run kept none."""
    model = ModelSettings(folder.name, run_and_model(str(folder))[1])
    return _fingerprints([found] if (found := _checkpoint(str(folder), model)).files else [])


def _fingerprints(found: Iterable[Input]) -> dict[str, Any]:
    return {
        one.key: {name: _stamp(file) | {"sha256": _sha256(file)} for name, file in one.files.items()} for one in found
    }


def write_inputs(folder: Path, found: Mapping[str, Any]) -> None:
    """Sets these keys of inputs.json; others stay."""
    atomic.write_text(folder / NAME, json.dumps(_recorded(folder) | dict(found), indent=1, sort_keys=True) + "\n")


def weights_read(folder: Path, key: str) -> str:
    """The first letters of a hash of the weights that `key`, model.path or checkpoint, meant: two models of one name
    are told apart wherever they lie. "" where that is not known, as of the hub's."""
    files = _recorded(folder).get(key) or {}
    hashes = sorted(stamp["sha256"] for name, stamp in files.items() if name.endswith(WEIGHTS[:2]))
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:12] if hashes else ""


def check_run_inputs(folder: Path, settings: RunSettings) -> list[str]:
    """A problem where the run folder answers to other inputs than there are now: a finished run, or an unfinished one
    that has kept something of the changed ones."""
    done = is_done(folder)
    if settings.overwrite or not (done or settings.resume):
        return []
    blocks, scores = any((folder / "blocks").glob("??????.json")), (folder / "scores.json").is_file()

    def matters(key: str) -> bool:
        return _matters(folder, key) if done or key.startswith("evaluator.") else blocks or scores

    return _changed(folder, settings, matters, "a finished run" if done else "an unfinished run", "start again")


def check_scored_inputs(folder: Path, settings: EvaluationSettings) -> list[str]:
    """A problem where scores that the folder holds are of other texts, questions or weights than there are now. A
    run's are of its own model and no other, whatever may be overwritten."""
    run, one = run_and_model(settings.checkpoint)[0], _checkpoint(settings.checkpoint, settings.model)
    before = _recorded(folder).get(one.key) if run and run.resolve() == folder.resolve() else None
    if before and (changes := _changes(before, one.files)):
        rule = "put it back, or name another folder with hydra.run.dir=; overwrite=true does not mix two models"
        return [f"{folder} holds scores of another model: {one.said} has changed ({_told(changes)}); {rule}"]
    matters = partial(_matters, folder)
    return [] if settings.overwrite else _changed(folder, settings, matters, "scores", "score it again")


def _changed(
    folder: Path, settings: RunSettings | EvaluationSettings, matters: Callable[[str], bool], state: str, again: str
) -> list[str]:
    """A problem where inputs that matter are no longer what inputs.json says."""
    recorded = _recorded(folder)
    changed = [
        f"{one.said} has changed ({_told(changes)})"
        for one in inputs_of(settings)
        if matters(one.key) and one.key in recorded and (changes := _changes(recorded[one.key], one.files))
    ]
    remedy = f"put it back, {again} with overwrite=true, or name another folder with hydra.run.dir="
    return [f"{folder} holds {state} of other inputs: {'; '.join(changed)}; {remedy}"] if changed else []


def _matters(folder: Path, key: str) -> bool:
    """Whether the folder holds a score that the key decides; what was n/a may be mended. Others always matter."""
    group, _, name = key.partition(": ")
    kind = {"evaluator.perplexity_sets": "perplexity"}.get(group, "zero_shot")
    if not group.startswith("evaluator."):
        return True
    results, under_way = (atomic.read_json(folder / file) or {} for file in ("results.json", "scores.json"))
    kept = [scores.get(kind) or {} for scores in (results, *under_way.values())]
    return any(scores.get(name) is not None if name else scores for scores in kept)


def _changes(before: Mapping[str, Any], now: Mapping[str, Path]) -> list[str]:
    """File by file."""
    new = [name for name in now if name not in before and name.endswith(WEIGHTS)]
    found = [f"{name} is new" for name in new] + [f"{name} is gone" for name in before if name not in now]
    for name, file in now.items():
        if name in before and _differs(before[name], file):
            found.append(f"{name}: {_said(before[name])} then, {_said(_stamp(file))} now")
    return found


def _differs(before: Mapping[str, Any], file: Path) -> bool:
    now = _stamp(file)
    if now["size"] != before["size"]:
        return True
    same_time = now["modified"] == before["modified"]
    return not (same_time and now["size"] > SMALL) and _sha256(file) != before["sha256"]


def _told(changes: list[str]) -> str:
    more = f" and {len(changes) - 2} more files" if len(changes) > 2 else ""
    return ", ".join(changes[:2]) + more


def _said(stamp: Mapping[str, Any]) -> str:
    when = datetime.fromtimestamp(stamp["modified"] / 1e9, UTC)
    return f"{stamp['size']:,} bytes of {when:%Y-%m-%d %H:%M:%S} UTC"


def _model_files(settings: ModelSettings) -> dict[str, Path]:
    folder = MODEL_DIR if settings.path == "embedded" else Path(settings.path).expanduser()
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return {file.name: file for file in found if file.name.endswith(OF_A_MODEL) and file.is_file()}


def _scored(settings: EvaluatorSettings) -> Iterator[Input]:
    for name in settings.perplexity_sets:
        yield Input(f"evaluator.perplexity_sets: {name}", f"evaluator.perplexity_sets={name}", _one(name))
    if settings.data_dir is not None:
        mirror, said = Path(settings.data_dir).expanduser(), f"evaluator.data_dir={settings.data_dir}"
        for task in settings.tasks:
            parts = [task] if (mirror / task).is_dir() else [part.name for part in needed(task, settings.include_path)]
            for part in parts:
                yield Input(f"evaluator.data_dir: {part}", said, _below(mirror / part, mirror))
    if settings.include_path is not None and settings.tasks:
        own = Path(settings.include_path).expanduser()
        yield Input("evaluator.include_path", f"evaluator.include_path={settings.include_path}", _below(own, own))


def _below(folder: Path, root: Path) -> dict[str, Path]:
    """All files in a folder, by their path in `root`."""
    found = sorted(file for file in folder.glob("**/*") if file.is_file() and file.suffix != ".pyc")
    return {str(file.relative_to(root)): file for file in found}


def _one(given: str) -> dict[str, Path]:
    """The file, by its name; nothing where the name is that of a preset or of the hub."""
    file = Path(given).expanduser()
    return {file.name: file} if file.is_file() else {}


def _stamp(file: Path) -> dict[str, int]:
    found = file.stat()
    return {"size": found.st_size, "modified": found.st_mtime_ns}


def _sha256(file: Path) -> str:
    found = file.stat()
    return _sha256_of(str(file.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=1024)  # the jobs of a sweep read the same files
def _sha256_of(path: str, size: int, *times: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        if size <= HASHED_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        for number in range(PIECES):
            file.seek(number * (size - PIECE) // (PIECES - 1))
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def _recorded(folder: Path) -> dict[str, Any]:
    """{} where there is none, or one that cannot be read."""
    found = atomic.read_json(folder / NAME) or {}
    try:
        sound = all({"size", "modified", "sha256"} <= set(f) for files in found.values() for f in files.values())
    except (TypeError, AttributeError):
        return {}
    return found if sound else {}
