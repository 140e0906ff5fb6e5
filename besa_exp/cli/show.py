"""`besa show GROUP=PRESET`: one preset with what each of its keys means, its type and its value; `besa show` alone
shows the keys of a run that belong to no group.

What a key means stands beside it in conf/ as a comment; its type is the dataclass's own, so that neither can
be out of date.
"""

from __future__ import annotations

import argparse
import io
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from besa_exp.cli.text_keys import typed_keys
from besa_exp.display.terminal import console_of
from besa_exp.errors import ConfigurationError, did_you_mean
from besa_exp.presets import CONF_DIR, default_preset, first_comment, groups, listing, no_such_group, presets
from besa_exp.settings import RunSettings

PLAIN_WIDTH = 120
NARROW = 80  # columns, below which keys are no table
WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
TARGET = "_target_"
KEYS, FLAGS = "\nKeys, changed as ", "\nFlags:\n"  # what the help's template has around the keys


@dataclass(frozen=True)
class Key:
    """One key of a preset: dotted, its value as YAML writes it, and the comment beside it."""

    name: str
    value: str
    comment: str


def show(arguments: Sequence[str]) -> int:
    """Prints what is asked for; 0. ConfigurationError: there is no such group, preset or key."""
    text = "Explains the keys of presets: meaning, type and value. Without arguments: the keys outside all groups."
    parser = argparse.ArgumentParser(prog="besa show", allow_abbrev=False, description=text)
    parser.add_argument(
        "words", nargs="*", metavar="GROUP=PRESET", help="such as pruner=besa; besa list names all presets"
    )
    parser.add_argument("--config-dir", "-cd", type=Path, metavar="DIR", help="read your own presets in DIR too")
    asked = parser.parse_args(arguments)
    console = console_of(PLAIN_WIDTH)
    if not asked.words:
        _tell(console, "besa prune", CONF_DIR / "prune.yaml", "", _types(RunSettings))
    for number, word in enumerate(asked.words):
        if number:
            console.print()
        _show_one(console, word, asked.config_dir)
    return 0


def _show_one(console: Console, word: str, beside: Path | None) -> None:
    group, _, name = word.partition("=")
    known = {**{group: group for group in groups()}, **{f"{group}s": group for group in groups()}}
    if group in known and not name:
        print(listing([known[group]], beside))
        return
    own = {key.name: key for key in keys_of(CONF_DIR / "prune.yaml")}
    if not name and group in own:
        _tell(console, "besa prune", CONF_DIR / "prune.yaml", "", _types(RunSettings), only=group)
        return
    if group not in known:
        raise ConfigurationError(no_such_group(group, {*known, *own}, "group or key"))
    group = known[group]
    own = {path.stem: path for path in (beside / group).glob("*.yaml")} if beside else {}
    ours = {preset: CONF_DIR / group / f"{preset}.yaml" for preset in presets(group)}
    if (path := (own | ours).get(name)) is None:
        raise ConfigurationError(f"{word}: no such preset{did_you_mean(name, [*own, *ours])}; besa list {group}")
    default = ", the default" if name == default_preset(group) and "default" not in first_comment(path) else ""
    hints = _types(RunSettings) if group in ("experiment", "debug") else None  # whose keys are those of a run
    _tell(console, f"{group}={name}{default}", path, "" if hints else group, hints)


def _tell(console: Console, head: str, path: Path, group: str, hints: Mapping[str, Any] | None, only: str = "") -> None:
    keys = [key for key in keys_of(path) if not only or key.name == only or key.name.startswith(f"{only}.")]
    classes = {key.name: key.value for key in keys if key.name.rpartition(".")[2] == TARGET}
    types_ = dict(hints or {}) | {name: hint for key, cls in classes.items() for name, hint in _hints(key, cls).items()}
    comment = first_comment(path) if path.parent != CONF_DIR else ""
    line = Text(head, style="bold")
    line.append(f": {comment}" if comment else "", style="not bold")
    console.print(line)
    shown = [key for key in keys if key.name.rpartition(".")[2] != TARGET]
    prefix = f"{group}." if group else ""
    if not shown:
        console.print("It has no keys of its own.")
        return
    rows = [(f"{prefix}{key.name}", _value(key.value), types_.get(key.name, ""), key.comment) for key in shown]
    if console.width < NARROW:  # one below the other
        for name, value, kind, meaning in rows:
            console.print(Text.assemble((name, "bold"), f" = {value}", (f"  {kind}", "dim")))
            console.print(Padding(Text(meaning), (0, 0, 0, 4)))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("key", "value", "type", "what it means"):
        table.add_column(column, overflow="fold", no_wrap=column == "type" and console.width >= 100)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _value(text: str) -> str:
    if text == "???":
        return "to be given"
    return re.sub(r"^\$\{(\w+)\}$", r"as \1", text)


def keys_of(path: Path) -> list[Key]:
    """Every key of a YAML file with its comment, those of the presets it builds on first; its own win."""
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text, yaml.SafeLoader)
    found: dict[str, Key] = {}
    if not isinstance(root, yaml.MappingNode):
        return []
    lines = text.splitlines()
    for key, value in root.value:
        if key.value == "defaults":
            found |= {one.name: one for one in _chosen(yaml.safe_load(text)["defaults"], path)}
        elif key.value == "hydra":
            swept = (((yaml.safe_load(text)["hydra"] or {}).get("sweeper") or {}).get("params") or {}).items()
            found |= {name: Key(name, str(values), "swept: one job each") for name, values in swept}
        else:
            for own in _flat(key, value, "", lines):
                comment = own.comment or (found[own.name].comment if own.name in found else "")
                for base in [*found]:  # a value takes the place of a group, and an object that of a value
                    if own.name == f"{base}.{TARGET}" or base.startswith(f"{own.name}."):
                        del found[base]
                found[own.name] = Key(own.name, own.value, comment)
    return list(found.values())


def _chosen(defaults: Sequence[Any], path: Path) -> Iterator[Key]:
    """The keys of the presets that a preset builds on, and those that an experiment chooses (`override /model`)."""
    for item in defaults:
        bases = [folder / f"{item}.yaml" for folder in (CONF_DIR / path.parent.name, path.parent)]
        if path.name != "prune.yaml" and (base := next(filter(Path.is_file, bases), None)):
            yield from keys_of(base)
        for name, value in item.items() if isinstance(item, dict) else ():
            if (group := name.removeprefix("override /")) != name:
                yield Key(group, str(value), f"besa show {group}={value}")


def _flat(key: yaml.Node, value: yaml.Node, prefix: str, lines: Sequence[str]) -> Iterator[Key]:
    name = f"{prefix}{key.value}"
    if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
        for inner_key, inner in value.value:
            yield from _flat(inner_key, inner, f"{name}.", lines)
        return
    end = value.end_mark
    text = str(yaml.safe_load(yaml.serialize(value)))
    if value.start_mark.line == end.line:  # as it is written there
        text = lines[end.line][value.start_mark.column : end.column]
    comment = lines[end.line][end.column :] if end.line < len(lines) else ""
    yield Key(name, text.strip(), comment.partition("#")[2].strip())


def _hints(key: str, target: str) -> dict[str, str]:
    """{dotted key: type in words} of the dataclass that `_target_` names; {} where it cannot be imported or is none."""
    try:
        return _types(resolve_name(target), key.removesuffix(TARGET))
    except (ImportError, AttributeError, NameError, TypeError, ValueError):
        return {}


def _types(cls: type, prefix: str = "") -> dict[str, str]:
    return {key: in_words(hint) for key, hint in typed_keys(cls, prefix)}


def in_words(hint: Any) -> str:
    """A type as a person reads it: `row or linear`, `whole number or null`, `list of text`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(filter(None, ("null" if part is type(None) else in_words(part) for part in inner)))
    if origin is tuple:
        return f"list of {in_words(inner[0])}"
    if origin is dict:
        return "group of keys"
    return WORDS.get(hint, "group of keys" if is_dataclass(hint) else "")


@contextmanager
def explained(config_name: str, choices: Mapping[str, Any], beside: Path | None) -> Iterator[None]:
    """What is printed meanwhile is a help text: it is printed with the comments of the `choices`' presets, those of the
    folder `beside` among them."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            yield
    finally:
        print(with_meanings(said.getvalue(), meanings(config_name, choices, beside)), end="", flush=True)


def meanings(config_name: str, choices: Mapping[str, Any], beside: Path | None) -> dict[str, str]:
    """{dotted key: its comment} of a command's own keys and of the presets that are chosen, {group: preset}."""
    own = [CONF_DIR / "command.yaml", CONF_DIR / f"{config_name}.yaml"]
    found = {key.name: key.comment for file in own for key in keys_of(file)}
    for group, name in choices.items():
        for folder in filter(None, (CONF_DIR, beside)):
            if (file := folder / group / f"{name}.yaml").is_file():
                found |= {f"{group}.{key.name}": key.comment for key in keys_of(file)}
    return found


def with_meanings(text: str, meaning: Mapping[str, str]) -> str:
    """The help text with the comments; where a class lies is left out."""
    before, keys, rest = text.partition(KEYS)
    body, flags, after = rest.partition(FLAGS)
    lines: list[str] = []
    path: list[str] = []
    for line in body.splitlines():
        if found := re.match(r"( *)(\w+):", line):
            path[len(found[1]) // 2 :] = [found[2]]
        comment = meaning.get(".".join(path), "") if found else ""
        if not (found and found[2] == TARGET):
            lines.append(f"{line}  # {comment}" if comment else line)
    return "".join([before, keys, "\n".join([*lines, ""]), flags, after])
