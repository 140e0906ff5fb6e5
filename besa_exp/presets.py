"""The YAML presets that ship with the package, by group, with the line each says about itself.

A preset is read here without Hydra too, for the Python API: its YAML, those that its defaults list names under it, and
`${key}` replaced by a value that is given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

import yaml

from besa_exp.errors import ConfigurationError, did_you_mean

# What a method is made of, in the order in which it is named. The groups of this list, and of no other, make up a run's
# name, identity and folder and are handed to it as objects: a new one is a word here, a line in conf/prune.yaml and a
# field of RunSettings, None where the group is not chosen.
METHOD_GROUPS = ("structure", "budget", "pruner", "update", "recovery")

# conf/ stands at the top of a checkout and inside the package in a wheel.
CONF_DIR = next(
    folder for folder in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf") if folder.is_dir()
)


def groups() -> list[str]:
    """The groups a preset is chosen from: calibration, debug, evaluator, ..."""
    return sorted(folder.name for folder in CONF_DIR.iterdir() if folder.is_dir())


def presets(group: str, folder: Path = CONF_DIR) -> dict[str, str]:
    """{preset: its one-line comment} of a group."""
    return {path.stem: first_comment(path) for path in sorted((folder / group).glob("*.yaml"))}


def preset(group: str, name: str, seed: int = 0) -> Any:
    """The object that a preset describes: `preset("pruner", "besa")` is a frozen dataclass, which `dataclasses.replace`
    copies with other values. `seed`: what presets refer to as `${seed}`.

    ConfigurationError: there is no such group or preset, or a value has to be given."""
    return _built(preset_values(group, name, seed))


def preset_values(group: str, name: str, seed: int = 0) -> dict[str, Any]:
    """The keys of a preset with their values, `_target_` among them; see `preset`."""
    if not (CONF_DIR / group).is_dir():
        raise ConfigurationError(
            f"{group}: no such group{did_you_mean(group, groups())}; groups: {', '.join(groups())}"
        )
    if name not in presets(group):
        near = did_you_mean(name, presets(group))
        raise ConfigurationError(f"{group}={name}: no such preset{near}; presets: {', '.join(presets(group))}")
    return _resolved(composed(CONF_DIR / group / f"{name}.yaml"), seed, f"{group}={name}")


def composed(path: Path) -> dict[str, Any]:
    """A preset over those of its folder that its defaults list names; `_self_` says where its own keys come in."""
    own: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    bases = own.pop("defaults", [])
    values: dict[str, Any] = {}
    for base in bases if "_self_" in bases else [*bases, "_self_"]:
        values = _merged(values, own if base == "_self_" else composed(path.with_name(f"{base}.yaml")))
    return values


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of keys are merged key by key, as Hydra does; all else is replaced."""
    both = {
        key: _merged(under[key], value)
        for key, value in over.items()
        if isinstance(value, Mapping) and isinstance(under.get(key), Mapping)
    }
    return {**under, **over, **both}


def _resolved(value: Any, seed: int, where: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _resolved(item, seed, f"{where}, {key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, seed, where) for item in value]
    if value == "???":
        raise ConfigurationError(f"{where}: the preset leaves this value to you; build the object yourself and give it")
    return seed if value == "${seed}" else value


def _built(value: Any, hint: Any = None) -> Any:
    """Lists as tuples, and groups of keys as the dataclass that `_target_` or the type hint of their field names."""
    if isinstance(value, list):
        return tuple(map(_built, value))
    if not isinstance(value, Mapping):
        return value
    cls = resolve_name(value["_target_"]) if "_target_" in value else _dataclass_in(hint)
    hints = get_type_hints(cls) if cls else {}
    built = {key: _built(item, hints.get(key)) for key, item in value.items() if key != "_target_"}
    return cls(**built) if cls else built


def _dataclass_in(hint: Any) -> Any:
    """`Tuning` in `Tuning` and in `Tuning | None`; None where there is none."""
    return next((option for option in (hint, *get_args(hint)) if is_dataclass(option)), None)


def first_comment(path: Path) -> str:
    """The first comment line of a YAML file that says something (`# @package ...` does not); "" where there is none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        comment = re.fullmatch(r"#(?!\s*@package)\s*(.+)", line)
        if comment:
            return comment[1].strip()
    return ""


def default_preset(group: str) -> str | None:
    """The preset of `group` that `besa prune` takes by itself."""
    found = re.search(rf"^\s*- {group}:\s*(\w+)", (CONF_DIR / "prune.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found and found[1] != "null" else None


def listing(wanted: Sequence[str] = (), beside: Path | None = None) -> str:
    """The presets of the wanted groups (all of them by default), a line each."""
    parts = []
    for group, lines in listed(wanted, beside).items():
        width, default = max(map(len, lines), default=0), default_preset(group)
        shown = [f"  {name:<{width}}  {line}{' (default)' if name == default else ''}" for name, line in lines.items()]
        parts.append("\n".join([f"{group}=", *shown]))
    return "\n\n".join(parts)


def listed(wanted: Sequence[str] = (), beside: Path | None = None) -> dict[str, dict[str, str]]:
    """{group: {preset: its line}} of the wanted groups (all of them by default), with those in the folder `beside`;
    `models` is as good as `model`.

    ConfigurationError: there is no such group or folder."""
    if beside is not None and not beside.is_dir():
        raise ConfigurationError(f"--config-dir={beside}: there is no such folder; give one with GROUP/NAME.yaml files")
    known = {name: group for group in groups() for name in (group, re.sub("ys$", "ies", f"{group}s"))}
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigurationError(*(no_such_group(name, known) for name in unknown))
    chosen = dict.fromkeys(known[name] for name in wanted or groups())
    found = {group: presets(group) for group in chosen}
    if beside is not None:
        for group in chosen:
            found[group] |= {name: f"{line} (of {beside})".strip() for name, line in presets(group, beside).items()}
    return found


def no_such_group(word: str, known: Iterable[str], what: str = "group") -> str:
    """The problem of a word that is no group; a preset's name is shown with its group, else the nearest of `known`."""
    holding = [f"besa show {group}={word}" for group in groups() if word in presets(group)]
    near = f"; it is a preset: {' or '.join(holding)}" if holding else did_you_mean(word, known)
    return f"{word}: no such {what}{near}; groups: {', '.join(groups())}"
