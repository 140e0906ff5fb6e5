"""What blocks were pruned from, and what a finished run answers: blocks of another request are never gone on with, and
a finished run is not shown for another request. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from besa_exp.errors import ConfigurationError, argument
from besa_exp.machine.environment import masked
from besa_exp.presets import METHOD_GROUPS
from besa_exp.settings import RunSettings
from besa_exp.tensors.pattern import fixes_sparsity

IDENTITY = "identity.json"  # in the folder of the blocks
# Of a model's keys: where the weights lie, and what is said about them elsewhere. They decide nothing.
NOT_DECIDING = ("load", "convert", "name", "context", "published_perplexity")
DECIDING = ("method", "model", "calibration", *METHOD_GROUPS, "sparsity", "pattern", "seed", "deterministic")
DECIDING += ("compute_dtype", "ignore", "teacher")
# With what decides the results of the same blocks.
DETERMINING = (*DECIDING, "checkpoint", "evaluator", "skipping", "device", "save")
NOT_RESULTS = ("verify", "push_to_hub")  # of the keys of `save`


def config_of(settings: RunSettings) -> dict[str, Any]:
    """The settings as a configuration would say them: plain values, and `_target_` where a method's object stands."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    name = values.pop("pruner_name")
    plain = {
        key: method_described(value) if key in METHOD_GROUPS else _described(value) for key, value in values.items()
    }
    for key, value in plain.items():
        if key not in METHOD_GROUPS and isinstance(value, dict):
            value.pop("_target_", None)
    return {"method": name, **plain}


def method_described(method: Any) -> Any:
    """A method's values with `_target_`, its class; None where there is none."""
    plain = _described(method)
    if method is None or isinstance(plain, dict):
        return plain
    return {"_target_": _place(method), **_described(vars(method))}


def _described(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        of_fields = {field.name: _described(getattr(value, field.name)) for field in fields(value)}
        return {"_target_": _place(value), **of_fields}
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    return value if value is None or isinstance(value, str | int | float) else repr(value)


def _place(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def request_identity(config: Mapping[str, Any], tokens_sha256: str | None = None) -> dict[str, Any]:
    """What blocks are pruned from: the part of the configuration that decides about them, and calibration tokens.

    `config["method"]` names the presets, `owl+wanda+obs`; their values stand under their groups."""
    identity = _of_keys(config, DECIDING)
    return identity | ({"calibration_tokens_sha256": tokens_sha256} if tokens_sha256 else {})


def results_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's results are determined by: not tracker, offline and overwrite, and no sparsity beside a pattern that
    fixes it."""
    fixed = fixes_sparsity(str(config.get("pattern")))
    return _of_keys(config, [key for key in DETERMINING if not (fixed and key == "sparsity")])


def _of_keys(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Those keys of the configuration, without the ones below them that decide nothing."""
    found = without_places({key: config[key] for key in keys if key in config})
    for group, idle in (("model", NOT_DECIDING), ("save", NOT_RESULTS)):
        if isinstance(found.get(group), Mapping):
            found[group] = {key: value for key, value in found[group].items() if key not in idle}
    return found


def without_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without the Python path of any class, so that a class may move. The presets' names stand for the classes
    of a method's groups; a class deeper down goes by its own name, `Tuning`."""
    kept = {key: _class_names(value) for key, value in values.items()}
    for group in METHOD_GROUPS:
        if isinstance(kept.get(group), dict):
            kept[group].pop("_target_", None)
    return kept


def _class_names(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): str(item).rpartition(".")[2] if key == "_target_" else _class_names(item)
            for key, item in value.items()
        }
    return [_class_names(item) for item in value] if isinstance(value, list | tuple) else value


def check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """ConfigurationError where `folder` holds blocks of another request; only the keys that both know are compared."""
    path = folder / IDENTITY
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); start again with overwrite=true") from error
    if differences := _differences(before, as_plain(identity)):
        raise ConfigurationError(
            f"{folder.parent} holds an unfinished run of another request ({'; '.join(differences)}); repeat the old "
            "request to resume it, start again with overwrite=true, or name another folder with hydra.run.dir="
        )


def check_finished(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """A problem where the finished run in `folder` answers another request, in a complete sentence."""
    try:
        before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        asked = (as_plain(results_identity(values)) for values in (before, masked(config)))
    except (OSError, ValueError, yaml.YAMLError, TypeError, AttributeError):  # what it was asked is not known
        return []
    differences = _differences(*asked)
    if not differences:
        return []
    scores = all(text.startswith(("evaluator.", "skipping")) for text in differences)
    more = f", score it further with besa evaluate {argument('checkpoint', str(folder))}" if scores else ""
    return [
        f"{folder} holds a finished run of another request ({'; '.join(differences)}); repeat the old request to see "
        f"it{more}, start again with overwrite=true, or name another folder with hydra.run.dir="
    ]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two requests of plain keys say differently; a key that only one of them knows came later, unless the other
    says null for all of them."""
    told = [
        f"{key}: {_as_written(before[key])} before, {_as_written(now[key])} now"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key]
    ]
    for one, other, words in ((before, now, "null before"), (now, before, "null now")):
        nulls = [key for key, value in one.items() if value is None]
        told += [f"{key}: {words}" for key in nulls if any(name.startswith(f"{key}.") for name in other)]
    return told


def _as_written(value: Any) -> str:
    """As it is written for a key: null, true."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def as_plain(identity: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values, as JSON gives them back."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        if isinstance(value, Mapping):
            flat |= as_plain(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat
