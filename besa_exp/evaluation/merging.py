"""Scores that join those a results.json holds already: what is left to score, what speaks against it, and the union.

A set or task stands under one name, so a second score under other conditions (another window, other tokens, another
limit) would silently take the first one's place: it is a conflict, unless overwriting was asked for, and then the first
one is kept, with its record, in `provenance.replaced`. No torch here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from besa_exp.errors import ConfigurationError
from besa_exp.evaluation.checks import perplexity_window, prompts_of
from besa_exp.evaluation.score import PARTS, Score, Scores, asked_of, perplexity_score
from besa_exp.evaluation.task_definitions import TASK_FOLDERS, scored_names
from besa_exp.machine.environment import version_of
from besa_exp.settings import EvaluatorSettings, SkippingSettings
from besa_exp.texts.sources import file_sha256, is_token_file
from besa_exp.texts.token_files import token_file_shape

KINDS = ("perplexity", "zero_shot")


@dataclass(frozen=True)
class Remaining:
    """`settings` name what is still to be scored; `known` says in lines what is there; `conflicts` what is there under
    other conditions than are asked for."""

    settings: EvaluatorSettings
    known: tuple[str, ...]
    conflicts: tuple[str, ...]


def remaining(
    settings: EvaluatorSettings,
    seed: int,
    context: int | None,
    results: Mapping[str, Any],
    overwrite: bool = False,
    skipping: SkippingSettings | None = None,
) -> Remaining:
    """What `results` (a results.json, or {}) leaves to be scored. `context` None: the model's is not known."""
    if overwrite:
        return Remaining(settings, (), ())
    known, conflicts, scores = [], [], Scores.from_dict(results)
    unscored: dict[str, list[str]] = {kind: [] for kind in KINDS}
    names = [("perplexity", name) for name in settings.perplexity_sets]
    for kind, name in (*names, *(("zero_shot", name) for name in scored_names(settings))):
        if not (found := scores.named(kind, name)):
            unscored[kind].append(name)
            continue
        record = scores.conditions(found[0])
        if kind == "perplexity":
            what, state = f"perplexity on {name}", f": already scored, {found[0].value:.4f}"
            differs = _set_difference(name, settings, context, record)
        else:
            what, state = f"zero-shot {name}", f" is known{_older(record)}"
            differs = _task_difference(name, settings, seed, record)
        differs += _skipping_difference(skipping, record)
        if differs:
            conflicts.append(
                f"{what} was scored under other conditions ({'; '.join(differs)}): overwrite=true replaces the score, "
                "hydra.run.dir= keeps both"
            )
        else:
            known.append(what + state)
    simulate = settings.simulated_speed and not results.get("simulated_speed")
    if settings.simulated_speed and not simulate:
        known.append("simulated speed is known")
    sets, tasks = map(tuple, unscored.values())
    left = replace(settings, perplexity_sets=sets, tasks=tasks, simulated_speed=simulate)
    if settings.prompts and not set(settings.prompts) - scores.texts.keys():
        known.append("text samples are known")
    return Remaining(_without_known_texts(left, scores.texts), tuple(known), tuple(conflicts))


def _without_known_texts(left: EvaluatorSettings, texts: Mapping[str, str]) -> EvaluatorSettings:
    asked = prompts_of(left)
    missing = tuple(prompt for prompt in asked if prompt not in texts)
    # Where nothing is said of prompts they come by themselves, where they can.
    return left if left.prompts is None and missing == asked else replace(left, prompts=missing)


def _skipping_difference(skipping: SkippingSettings | None, record: Mapping[str, Any]) -> list[str]:
    """A score under a policy is another one than without."""
    then, now = asked_of(record.get("skipping")), skipping.asked if skipping else {}
    return [f"skipping {then or 'nothing'} then, {now or 'nothing'} now"] if then != now else []


def merged(results: Mapping[str, Any], scores: Scores) -> tuple[dict[str, Any], list[str]]:
    """`results` with the scores, and lines about every score that changed or could not be measured again."""
    before, notes = Scores.from_dict(results), []
    common = before.common or scores.common
    own = {key: value for key, value in scores.common.items() if common.get(key) != value}
    union = {(score.kind, score.name, score.metric): score for score in before.scores}
    measured = {
        "cost": "decode_tokens_per_second" in scores.cost,
        "text samples": scores.texts,
        "simulated speed": scores.simulated_speed,
        "speed": scores.speed and "unavailable" not in scores.speed,
    }
    unavailable = {name: reason for name, reason in before.unavailable.items() if not measured.get(name)}
    replaced = []
    for kind, name in dict.fromkeys((score.kind, score.name) for score in scores.scores):
        found = scores.named(kind, name)
        if not found:
            continue
        if kind == "zero_shot":
            found = tuple(replace(score, conditions={**own, **score.conditions}) for score in found)
        lines, kept = _replaced(before, before.named(kind, name), replace(scores, scores=found, common=common))
        notes += lines
        replaced += kept
        union = {key: score for key, score in union.items() if key[:2] != (kind, name)}
        union |= {(score.kind, score.name, score.metric): score for score in found}
        unavailable.pop(name, None)
    for name, reason in scores.unavailable.items():
        if any(before.named(kind, name) or scores.named(kind, name) for kind in KINDS):
            notes.append(f"{name} could not be scored again ({reason}); its earlier score is kept")
            continue
        unavailable[name] = reason
        if name in scores.perplexity:
            union["perplexity", name, ""] = perplexity_score(name, None, {})
    parts = {name: getattr(scores, name) or getattr(before, name) for name in PARTS}  # another device, it may be
    parts["cost"] = {**before.cost, **scores.cost}
    parts["texts"] = {**before.texts, **scores.texts}
    joined = Scores(tuple(union.values()), unavailable, common, **parts)
    provenance = {**(results.get("provenance") or {}), **joined.provenance}
    if replaced:
        provenance["replaced"] = [*provenance.get("replaced", []), *replaced]
    return {**copy.deepcopy(dict(results)), **joined.to_dict(), "provenance": provenance}, notes


def _replaced(before: Scores, old: Sequence[Score], now: Scores) -> tuple[list[str], list[dict[str, Any]]]:
    """The line about one set or task, `old` before, if anything of it changes, and what is kept of it then."""
    if not old:
        return [], []
    kind, name = old[0].kind, old[0].name
    was, is_now = before.conditions(old[0]), now.conditions(now.scores[0])
    differing = sorted(key for key in was.keys() | is_now.keys() if was.get(key) != is_now.get(key))
    first, second = (getattr(scores, kind)[name] for scores in (before, now))  # as results.json has it
    if first == second and not differing:
        return [], []
    how = "; ".join(f"{key} {was.get(key)} before, {is_now.get(key)} now" for key in differing)
    line = f"{kind} {name}: {first} is replaced by {second} ({how or 'measured alike'}); provenance.replaced keeps it"
    return [line], [{"kind": kind, "name": name, "value": first, "record": was}]


def _set_difference(
    name: str, settings: EvaluatorSettings, context: int | None, record: Mapping[str, Any]
) -> list[str]:
    """How the tokens that were scored differ from those asked for, as far as this can be known without a tokenizer."""
    path = Path(name).expanduser()
    differs = []
    if path.is_file() and record.get("file_sha256") not in (None, file_sha256(path)):
        differs.append("the file has changed since")
    if path.is_file() and record.get("column") not in (None, settings.column):
        differs.append(f"column {record['column']} then, {settings.column} now")
    window = None if context is None and settings.seq_len is None else perplexity_window(settings, context or 0)
    if window is not None and not _has_own_windows(name) and record.get("seq_len") not in (None, window):
        differs.append(f"windows of {record['seq_len']} tokens then, {window} now")
    most, then = settings.max_windows, record.get("max_windows")
    if then != most and (then is not None or record.get("num_windows", 0) > (most or 0)):
        differs.append(f"{then or 'all'} windows then, {most or 'all'} now")
    return differs


def _has_own_windows(name: str) -> bool:
    if not is_token_file(name):
        return False
    try:
        return len(token_file_shape(Path(name).expanduser())) == 2
    except ConfigurationError:  # reported where the file is checked
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


def _older(record: Mapping[str, Any]) -> str:
    """Says where a task was scored with another lm-eval than the one that is installed."""
    installed = version_of("lm-eval")
    scored = record.get("lm_eval", installed)
    return "" if installed in (None, scored) else f", scored with lm-eval {scored} ({installed} is installed)"
