"""What pruned blocks were pruned from: blocks of another request are never gone on with. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from besa_exp.errors import ConfigurationError
from besa_exp.presets import METHOD_GROUPS
from besa_exp.settings import RunSettings

IDENTITY = "identity.json"  # in the folder of the blocks
# Of a model's keys: where the weights lie, and what is said about them elsewhere. They decide nothing.
NOT_DECIDING = ("load", "convert", "name", "context", "published_perplexity")
DECIDING = ("method", "model", "calibration", *METHOD_GROUPS, "sparsity", "pattern", "seed", "deterministic")
DECIDING += ("compute_dtype", "ignore")


def config_of(settings: RunSettings) -> dict[str, Any]:
    """The settings as a configuration would say them: plain values, and `_target_` where a method's object stands."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    name = values.pop("pruner_name")
    plain = {key: _described(value) for key, value in values.items()}
    for key, value in values.items():
        if key not in METHOD_GROUPS and isinstance(plain[key], dict):
            plain[key].pop("_target_", None)
        elif key in METHOD_GROUPS and value is not None and not isinstance(plain[key], dict):
            plain[key] = {"_target_": _place(value), **_described(vars(value))}
    return {"method": name, **plain}


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
    identity = without_places({key: config[key] for key in DECIDING if key in config})
    if isinstance(identity.get("model"), Mapping):
        identity["model"] = {key: value for key, value in identity["model"].items() if key not in NOT_DECIDING}
    return identity | ({"calibration_tokens_sha256": tokens_sha256} if tokens_sha256 else {})


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
    now = as_plain(identity)
    differences = [
        f"{key}: {before[key]!r} before, {now[key]!r} now"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key]
    ]
    if differences:
        raise ConfigurationError(
            f"{folder.parent} holds an unfinished run of another request ({'; '.join(differences)}); ask for the same "
            "again to go on with it, start again with overwrite=true, or name another folder with hydra.run.dir="
        )


def as_plain(identity: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values, as JSON gives them back."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        if isinstance(value, Mapping):
            flat |= as_plain(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat
