"""The YAML presets that ship with the package, by group, with the line each says about itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from besa_exp.errors import ConfigurationError, did_you_mean

# What a method is made of, in the order in which it is named. The groups of this list, and of no other, make up a run's
# name, identity and folder and are handed to it as objects: a new one is a word here, a line in conf/prune.yaml and a
# field of RunSettings, None where the group is not chosen.
METHOD_GROUPS = ("budget", "pruner", "update")

# conf/ stands at the top of a checkout and inside the package in a wheel.
CONF_DIR = next(
    folder for folder in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf") if folder.is_dir()
)


def groups() -> list[str]:
    """The groups a preset is chosen from: calibration, debug, evaluator, ..."""
    return sorted(folder.name for folder in CONF_DIR.iterdir() if folder.is_dir())


def presets(group: str) -> dict[str, str]:
    """{preset: its one-line comment} of a group."""
    return {path.stem: first_comment(path) for path in sorted((CONF_DIR / group).glob("*.yaml"))}


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


def listing(wanted: Sequence[str] = ()) -> str:
    """The presets of the wanted groups (all of them by default), a line each; `models` is as good as `model`.

    ConfigurationError: there is no such group."""
    known = {**{group: group for group in groups()}, **{f"{group}s": group for group in groups()}}
    if unknown := [name for name in wanted if name not in known]:
        listed = ", ".join(groups())
        raise ConfigurationError(
            *(f"{name}: no such group{did_you_mean(name, known)}; groups: {listed}" for name in unknown)
        )
    return "\n\n".join(_group_listing(group) for group in dict.fromkeys(known[name] for name in wanted or groups()))


def _group_listing(group: str) -> str:
    lines = presets(group)
    width = max(map(len, lines), default=0)
    default = default_preset(group)
    shown = [f"  {name:<{width}}  {line}{' (default)' if name == default else ''}" for name, line in lines.items()]
    return "\n".join([f"{group}=", *shown])
