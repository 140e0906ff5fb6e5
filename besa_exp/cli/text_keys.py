"""Keys whose value is a text stay text: Hydra reads `model.path=2024_05_01` as the number 20240501 and the revision
`12e4567` as infinity. On the command line such values are quoted before Hydra sees them."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from besa_exp.settings import EvaluationSettings, RunSettings, TuneSettings

OF_HYDRA = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
# What Hydra would make a number or a truth value of. `null` stays nothing.
NUMBER = r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?\d[\d_]*)?"
NO_TEXT = re.compile(rf"{NUMBER}|[+-]?(inf|nan)|true|false", re.IGNORECASE)
PARTS = re.compile(r"([,\[\]])")  # of a sweep or a list


@cache
def text_keys() -> frozenset[str]:
    """The dotted keys of all commands whose value, or each of whose values, is a text."""
    return frozenset([*dict(_all_keys()), *OF_HYDRA])


@cache
def list_keys() -> frozenset[str]:
    """Those of them that take several."""
    return frozenset(key for key, several in _all_keys() if several)


def with_text_quoted(argument: str) -> str:
    """An argument `key=value` of a text key with each value in quotes that Hydra would read as something else."""
    key, equals, value = argument.partition("=")
    if not equals or key.lstrip("+") not in text_keys() or re.search(r"['\"(]", value):
        return argument
    if "[" in value and key.lstrip("+") not in list_keys():  # no list: refused as it is, with the quotes that it needs
        return argument
    parts = [f"'{part}'" if NO_TEXT.fullmatch(part.strip()) else part for part in PARTS.split(value)]
    return f"{key}={''.join(parts)}"


def typed_keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a dataclass, and of those that are its fields, each with its type."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        if field.init:
            key, hint = f"{prefix}{field.name}", hints[field.name]
            yield key, hint
            yield from typed_keys(of, f"{key}.") if is_dataclass(of := _without_none(hint)) else ()  # type: ignore[arg-type]


def _all_keys() -> Iterator[tuple[str, bool]]:
    """Those whose value is a text, each with whether it takes several."""
    for cls in (RunSettings, EvaluationSettings, TuneSettings):
        for key, hint in typed_keys(cls):
            text = _without_none(hint)
            several = get_origin(text) is tuple and get_args(text)[0] is str
            if text is str or several:
                yield key, several


def _without_none(hint: Any) -> Any:
    options = [option for option in get_args(hint) if option is not type(None)]
    return options[0] if get_origin(hint) in (Union, types.UnionType) and len(options) == 1 else hint
