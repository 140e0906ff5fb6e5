"""What a method is called and how it is drawn: the pruner's preset, and what differs from it.

Two runs of one preset with other settings (an ablation) are two methods. Colours are Okabe and Ito's, made darker or
lighter where a background asks for it; no two methods have the same colour and marker.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from besa_exp.presets import CONF_DIR, METHOD_GROUPS, composed, presets


@dataclass(frozen=True)
class Style:
    """Colours on light and dark ground, and a marker as plotly and as matplotlib calls it."""

    light: str
    dark: str
    symbol: str
    marker: str


COLOURS = {  # on light and on dark ground
    "grey": ("#6b7280", "#a3acb9"),
    "rose": ("#b0558a", "#e39ac4"),
    "amber": ("#b87400", "#f0b03a"),
    "green": ("#007f5c", "#2fc79a"),
    "blue": ("#0062a3", "#5aa9f0"),
    "sky": ("#3d97cf", "#a9dcff"),
    "orange": ("#c84a00", "#ff8a4c"),
    "wine": ("#8c1d40", "#f28ca6"),
    "violet": ("#7b1fa2", "#ce93d8"),
    "olive": ("#5b6b00", "#c2d14a"),
    "brown": ("#6d4c41", "#d7b49e"),
    "teal": ("#00696b", "#63d3d5"),
    "stone": ("#44403c", "#d6d3d1"),
}
MARKERS = {  # as plotly and as matplotlib call them
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "cross": "P",
    "x": "X",
    "pentagon": "p",
    "star": "*",
    "hexagon": "h",
    "triangle-left": "<",
    "triangle-right": ">",
    "diamond-tall": "d",
    "hexagon2": "H",
    "hourglass": "8",
}
FOLDERS = re.compile(r"=[^=,]*/(?=[^/,]+/[^/,]+)")
CHOSEN: Mapping[str, tuple[str, str]] = {  # what a preset of conf/pruner always looks like
    "dense": ("grey", "circle"),
    "magnitude": ("rose", "triangle-down"),
    "wanda": ("amber", "square"),
    "ria": ("olive", "cross"),
    "sparsegpt": ("green", "diamond"),
    "besa_paper": ("blue", "triangle-up"),
    "besa_linear": ("sky", "pentagon"),
    "besa": ("orange", "circle"),
    "besa_reconstruct": ("wine", "hexagon2"),
    "best": ("stone", "star"),
    "besa_joint": ("violet", "star"),
    "wanda_then_quantise": ("amber", "x"),
    "quantise_then_wanda": ("amber", "hourglass"),
    "sparsegpt_then_quantise": ("green", "x"),
    "quantise_then_sparsegpt": ("green", "hourglass"),
    "besa_then_quantise": ("orange", "x"),
    "quantise_then_besa": ("orange", "hourglass"),
}


@dataclass(frozen=True)
class Method:
    """A pruner's preset and, in `variant`, the settings in which a run differs from it."""

    pruner: str
    variant: str = ""

    @property
    def label(self) -> str:
        """As a legend says it: of a path the last two parts."""
        return f"{self.pruner}, {FOLDERS.sub('=.../', self.variant)}" if self.variant else self.pruner

    @property
    def order(self) -> tuple[int, str]:
        """Known ones first, from dense to BESA, then the others by name."""
        known = list(CHOSEN)
        return (known.index(self.pruner) if self.pruner in known else len(known), self.label)


def method_of(name: str, config: Mapping[str, Any], pattern: str, command: str = "") -> Method:
    """The method that `name` says (`wanda`, or `owl+wanda+obs`), chosen and set as in the run's configuration. Of a
    preset that is not the package's own, `command` says what was set."""
    differing = []
    for group in METHOD_GROUPS:
        own = [preset for part in name.split("+") if (preset := _preset(group, part))]
        if own:
            differing += _differences(config.get(group), own[0])
        elif config.get(group):
            words = command.split()
            differing += [word.partition(".")[2] for word in words if word.lstrip("+").startswith(f"{group}.")]
    if (dtype := config.get("compute_dtype", "auto")) != "auto":
        differing.append(f"compute_dtype={dtype}")
    if ignored := config.get("ignore"):
        differing.append(f"ignore={'+'.join(map(str, ignored))}")
    return Method(name, ", ".join([*([pattern] if pattern != "unstructured" else []), *differing]))


def full_config(config: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration, with what the run that made its checkpoint was asked."""
    return {**config, **(results.get("made_with") or {})}


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


def looks(methods: Iterable[Method]) -> dict[Method, Style]:
    """A colour and a marker for each method, no two methods the same pair; page and figures have both from here.

    A preset always looks the same, whatever else is there. Another method has the colour of the first known part of its
    name (`owl+wanda`: Wanda's) and a marker that nothing of this colour has, while there is one."""
    wanted = list(methods)
    chosen = {Method(name): pair for name, pair in CHOSEN.items()}
    later = [Method(name) for name in sorted(presets("pruner")) if name not in CHOSEN]
    others = sorted(set(wanted) - chosen.keys() - set(later), key=lambda method: method.order)
    for method in [*later, *others]:
        chosen[method] = _free_pair(method, set(chosen.values()))
    pairs = {method: chosen[method] for method in wanted}
    return {method: Style(*COLOURS[colour], marker, MARKERS[marker]) for method, (colour, marker) in pairs.items()}


def styles(pruners: list[str]) -> dict[str, Style]:
    """`looks` of methods without a variant, by their names."""
    return {method.pruner: style for method, style in looks(map(Method, pruners)).items()}


def _free_pair(method: Method, taken: set[tuple[str, str]]) -> tuple[str, str]:
    own = [CHOSEN[part][0] for part in method.pruner.split("+") if part in CHOSEN]
    used = Counter(colour for colour, _ in taken)
    colours = [*own, *sorted(COLOURS, key=lambda colour: used[colour])]
    pairs = ((colour, marker) for colour in colours for marker in MARKERS)
    return next((pair for pair in pairs if pair not in taken), (colours[0], "circle"))


def differences(settings: Mapping[str, Any], group: str, name: str) -> list[str]:
    """`key=value` for each of `settings` that is not as the preset `name` of `group` has it; none where it has none."""
    return _differences(settings, _preset(group, name))


@cache
def _preset(group: str, name: str) -> Mapping[str, Any]:
    """conf/GROUP/NAME.yaml with the presets of the group that it builds on; {} for what is not the package's."""
    return composed(CONF_DIR / group / f"{name}.yaml") if name in presets(group) else {}
