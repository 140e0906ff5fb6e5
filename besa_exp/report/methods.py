"""What a method is called and how it is drawn: the pruner's preset, and what differs from it.

Two runs of one preset with other settings (an ablation) are two methods. Colours are Okabe and Ito's, made darker or
lighter where a background asks for it; every method has a marker of its own too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from besa_exp.presets import CONF_DIR, METHOD_GROUPS


@dataclass(frozen=True)
class Style:
    """Colours on light and dark ground, and a marker as plotly and as matplotlib calls it."""

    light: str
    dark: str
    symbol: str
    marker: str


STYLES: Mapping[str, Style] = {
    "dense": Style("#6b7280", "#a3acb9", "line-ew-open", "_"),
    "magnitude": Style("#b0558a", "#e39ac4", "triangle-down", "v"),
    "wanda": Style("#b87400", "#f0b03a", "square", "s"),
    "sparsegpt": Style("#007f5c", "#2fc79a", "diamond", "D"),
    "besa_paper": Style("#0062a3", "#5aa9f0", "triangle-up", "^"),
    "besa_linear": Style("#3d97cf", "#a9dcff", "pentagon", "p"),
    "besa": Style("#c84a00", "#ff8a4c", "circle", "o"),
    "besa_reconstruct": Style("#8c1d40", "#f28ca6", "hexagon2", "H"),
    "besa_joint": Style("#7b1fa2", "#ce93d8", "star", "*"),
}
OTHERS = (
    Style("#44403c", "#d6d3d1", "hexagon", "h"),
    Style("#5b6b00", "#c2d14a", "cross", "P"),
    Style("#6d4c41", "#d7b49e", "x", "X"),
    Style("#1b4b7a", "#8fb8e0", "triangle-left", "<"),
    Style("#00696b", "#63d3d5", "triangle-right", ">"),
    Style("#6a3fa0", "#bfa3e8", "diamond-tall", "d"),
    Style("#9a6700", "#e0c060", "hourglass", "8"),
)


@dataclass(frozen=True)
class Method:
    """A pruner's preset and, in `variant`, the settings in which a run differs from it."""

    pruner: str
    variant: str = ""

    @property
    def label(self) -> str:
        """As a legend says it."""
        return f"{self.pruner}, {self.variant}" if self.variant else self.pruner

    @property
    def order(self) -> tuple[int, str]:
        """Known ones first, from dense to BESA, then the others by name."""
        known = list(STYLES)
        return (known.index(self.pruner) if self.pruner in known else len(known), self.label)


def method_of(name: str, config: Mapping[str, Any], pattern: str) -> Method:
    """The method that `name` says (`wanda`, or `owl+wanda+obs`), chosen and set as in the run's configuration."""
    differing = []
    for group in METHOD_GROUPS:
        presets = [preset for part in name.split("+") if (preset := _preset(group, part))]
        differing += _differences(config.get(group), presets[0]) if presets else []
    if (dtype := config.get("compute_dtype", "auto")) != "auto":
        differing.append(f"compute_dtype={dtype}")
    return Method(name, ", ".join([*([pattern] if pattern != "unstructured" else []), *differing]))


def _differences(settings: Any, preset: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The settings that are not the preset's own; what follows another key (`${seed}`) and new keys are left out."""
    found = []
    for key, value in (settings if isinstance(settings, Mapping) else {}).items():
        if key == "_target_":  # where a class lies says nothing about a run
            continue
        own = preset.get(key, value)
        if isinstance(own, Mapping):
            found += _differences(value, own, f"{prefix}{key}.")
        elif value != own and not str(own).startswith("${"):
            found.append(f"{prefix}{key}={str(value).lower() if isinstance(value, bool) else value}")
    return found


def styles(pruners: list[str]) -> dict[str, Style]:
    """A style for each pruner, the same whatever else is there for those that the package knows."""
    others = sorted({name for name in pruners if name not in STYLES})
    return {name: STYLES[name] for name in pruners if name in STYLES} | {
        name: OTHERS[number % len(OTHERS)] for number, name in enumerate(others)
    }


def differences(settings: Mapping[str, Any], group: str, name: str) -> list[str]:
    """`key=value` for each of `settings` that is not as the preset `name` of `group` has it; none where it has none."""
    return _differences(settings, _preset(group, name))


@cache
def _preset(group: str, name: str) -> Mapping[str, Any]:
    """conf/GROUP/NAME.yaml with the presets of the group that it builds on; {} for what is not the package's."""
    path = CONF_DIR / group / f"{name}.yaml"
    if not (path.parent == CONF_DIR / group and path.stem == name and path.is_file()):
        return {}
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    under: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        under |= _preset(group, base) if isinstance(base, str) else {}
    return under | own
