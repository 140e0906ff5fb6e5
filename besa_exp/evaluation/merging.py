"""Scores that join those a results.json holds already: what is left to score, what speaks against it, and the union.

A set or task stands under one name, so a second score under other conditions (another window, other tokens, another
limit) would silently take the first one's place: it is a conflict, unless overwriting was asked for, and then the first
one is kept, with its record, in `provenance.replaced`. No torch here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from besa_exp.errors import ConfigurationError
from besa_exp.evaluation.checks import perplexity_window
from besa_exp.evaluation.task_definitions import TASK_FOLDERS, scored_names
from besa_exp.settings import EvaluatorSettings
from besa_exp.texts.sources import file_sha256, is_token_file
from besa_exp.texts.token_files import token_file_shape

if TYPE_CHECKING:
    from besa_exp.evaluation.scores import Scores

COMMON = "tasks"  # in the record of zero-shot scores: all beside it holds for every task that does not say otherwise


@dataclass(frozen=True)
class Remaining:
    """`settings` name what is still to be scored; `known` tells in lines what is there; `conflicts` what is there under
    other conditions than are asked for."""

    settings: EvaluatorSettings
    known: tuple[str, ...]
    conflicts: tuple[str, ...]


def remaining(
    settings: EvaluatorSettings, seed: int, context: int | None, results: Mapping[str, Any], overwrite: bool = False
) -> Remaining:
    """What `results` (a results.json, or {}) leaves to be scored. `context` None: the model's is not known."""
    if overwrite:
        return Remaining(settings, (), ())
    known, conflicts, sets, tasks = [], [], [], []
    for name in settings.perplexity_sets:
        value, record = _score(results, "perplexity", name)
        if value is None:
            sets.append(name)
        elif differs := _set_difference(name, settings, context, record):
            conflicts.append(_conflict(f"perplexity on {name}", differs))
        else:
            known.append(f"perplexity on {name} is known: {value:.4f}")
    for name in scored_names(settings):
        value, record = _score(results, "zero_shot", name)
        if value is None:
            tasks.append(name)
        elif differs := _task_difference(name, settings, seed, record):
            conflicts.append(_conflict(f"zero-shot {name}", differs))
        else:
            known.append(f"zero-shot {name} is known{_older(record)}")
    simulate = settings.simulated_speed and not results.get("simulated_speed")
    if settings.simulated_speed and not simulate:
        known.append("simulated speed is known")
    left = replace(settings, perplexity_sets=tuple(sets), tasks=tuple(tasks), simulated_speed=simulate)
    return Remaining(left, tuple(known), tuple(conflicts))


def merged(results: Mapping[str, Any], scores: Scores) -> tuple[dict[str, Any], list[str]]:
    """`results` with the scores, and lines about every score that changed or could not be had anew."""
    union, told = copy.deepcopy(dict(results)), []
    for key in ("perplexity", "zero_shot", "unavailable", "provenance"):
        union.setdefault(key, {})
    for kind in ("perplexity", "zero_shot"):
        union["provenance"].setdefault(kind, {})
    header = {key: value for key, value in scores.provenance["zero_shot"].items() if key != COMMON}
    common = union["provenance"]["zero_shot"]
    if COMMON not in common:
        common |= {**header, COMMON: {}} if header else {}
    own = {key: value for key, value in header.items() if common.get(key) != value}
    for name, value in scores.perplexity.items():
        if value is not None:
            told += _put(union, "perplexity", name, value, scores.provenance["perplexity"][name])
    for name, metrics in scores.zero_shot.items():
        told += _put(union, "zero_shot", name, metrics, own | scores.provenance["zero_shot"][COMMON][name])
    for name, reason in scores.unavailable.items():
        if any(_score(union, kind, name)[0] is not None for kind in ("perplexity", "zero_shot")):
            told.append(f"{name} could not be scored anew ({reason}): its earlier score stays")
            continue
        union["unavailable"][name] = reason
        if name in scores.perplexity:
            union["perplexity"][name] = None
    if scores.simulated_speed:
        union["simulated_speed"] = scores.simulated_speed
        union["unavailable"].pop("simulated speed", None)
    if scores.speed:  # measured anew each time it is asked for: this may be another device
        union["speed"] = scores.speed
        if "unavailable" not in scores.speed:
            union["unavailable"].pop("speed", None)
    return union, told


def _put(union: dict[str, Any], kind: str, name: str, value: Any, record: Mapping[str, Any]) -> list[str]:
    """Sets one score, its record and whatever it replaces; the line about a change."""
    before, record_before = _score(union, kind, name)
    union[kind][name] = value
    records = union["provenance"][kind] if kind == "perplexity" else union["provenance"][kind][COMMON]
    records[name] = record
    union["unavailable"].pop(name, None)
    after = _score(union, kind, name)[1]
    differing = sorted(key for key in record_before.keys() | after.keys() if record_before.get(key) != after.get(key))
    if before is None or (before == value and not differing):
        return []
    replaced = {"kind": kind, "name": name, "value": before, "record": record_before}
    union["provenance"].setdefault("replaced", []).append(replaced)
    how = "; ".join(f"{key} {record_before.get(key)} before, {after.get(key)} now" for key in differing)
    return [f"{kind} {name}: {before} is replaced by {value} ({how or 'measured alike'}); provenance.replaced keeps it"]


def _score(results: Mapping[str, Any], kind: str, name: str) -> tuple[Any, dict[str, Any]]:
    """A score and its record, of a task with what holds for all; None: there is no score."""
    value = (results.get(kind) or {}).get(name)
    records = (results.get("provenance") or {}).get(kind) or {}
    if kind == "perplexity":
        return value, dict(records.get(name) or {})
    common = {key: item for key, item in records.items() if key != COMMON}
    return value, common | dict((records.get(COMMON) or {}).get(name) or {})


def _set_difference(
    name: str, settings: EvaluatorSettings, context: int | None, record: Mapping[str, Any]
) -> list[str]:
    """How the tokens that were scored differ from those asked for, as far as it can be told without a tokenizer."""
    path = Path(name).expanduser()
    differs = []
    if path.is_file() and record.get("file_sha256") not in (None, file_sha256(path)):
        differs.append("the file has changed since")
    if path.is_file() and record.get("column") not in (None, settings.column):
        differs.append(f"column {record['column']} then, {settings.column} now")
    window = None if context is None and settings.seq_len is None else perplexity_window(settings, context or 0)
    if window is not None and not _has_own_windows(name) and record.get("seq_len") not in (None, window):
        differs.append(f"windows of {record['seq_len']} tokens then, {window} now")
    return differs


def _has_own_windows(name: str) -> bool:
    if not is_token_file(name):
        return False
    try:
        return len(token_file_shape(Path(name).expanduser())) == 2
    except ConfigurationError:  # told where the file is checked
        return True


def _task_difference(name: str, settings: EvaluatorSettings, seed: int, record: Mapping[str, Any]) -> list[str]:
    """How the questions that were scored differ from those asked for. How many examples a task shows by itself is known
    of those that show none; of others only what is asked for is compared."""
    asked: dict[str, Any] = {"limit": settings.limit}
    if settings.num_fewshot is not None or name in TASK_FOLDERS:
        asked["num_fewshot"] = settings.num_fewshot or 0
    if asked.get("num_fewshot") or record.get("num_fewshot"):
        asked["seed"] = seed
    return [
        f"{key} {record[key]} then, {value} now"
        for key, value in asked.items()
        if key in record and record[key] != value
    ]


def _conflict(what: str, differs: list[str]) -> str:
    return (
        f"{what} has been scored otherwise ({'; '.join(differs)}): overwrite=true replaces the score and says so, "
        "hydra.run.dir= keeps both"
    )


def _older(record: Mapping[str, Any]) -> str:
    """Says where a task was scored with another lm-eval than the one that is installed."""
    try:
        installed = version("lm-eval")
    except PackageNotFoundError:
        return ""
    scored = record.get("lm_eval", installed)
    return "" if scored == installed else f", scored with lm-eval {scored} ({installed} is installed)"
