"""The keys that `--help` lists, each with the comment that stands beside it in its YAML."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from besa_exp.cli.show import TARGET, keys_of
from besa_exp.presets import CONF_DIR

KEYS, FLAGS = "\nKeys, changed as ", "\nFlags:\n"  # what the help's template has around the keys


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
