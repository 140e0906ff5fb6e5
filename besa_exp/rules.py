"""What a number or a name may be, as part of the type of the field that holds it: `epochs: Count = 1`,
`width: Annotated[float, within(least=0, below=1)] = 0.3`.

A type checker reads the plain type. `check_fields` holds an object to its rules when it is made, and the reader of a
configuration each key by itself, before the object is made: so a key has one rule, however it is set.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from besa_exp.errors import ConfigurationError

LARGEST_SEED = 2**32 - 1  # that every library's generator takes
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """`holds` decides of a value of the right type; `said` ends the sentence that begins with "must"."""

    holds: Callable[[Any], bool]
    said: str


def within(
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    note: str = "",
) -> Rule:
    """A number within these limits. `note` says more of the rule."""
    limits = {"above": above, "at least": least, "below": below, "at most": most}
    said = "be " + " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
    if least is not None and (below is not None or most is not None):
        said = f"be in [{least}, {below})" if most is None else f"be in [{least}, {most}]"
    elif least == 0:
        said = "not be negative"

    def holds(value: Any) -> bool:
        return (
            (above is None or value > above)
            and (least is None or value >= least)
            and (below is None or value < below)
            and (most is None or value <= most)
        )

    return Rule(holds, f"{said}, {note}" if note else said)


def one_of(*names: str) -> Rule:
    return Rule(lambda value: value in names, f"be one of {', '.join(names)}")


Count = Annotated[int, within(least=1)]
CountOrZero = Annotated[int, within(least=0)]
Seed = Annotated[int, within(least=0, most=LARGEST_SEED)]
Positive = Annotated[float, within(above=0)]
NotNegative = Annotated[float, within(least=0)]
Fraction = Annotated[float, within(above=0, below=1)]
Share = Annotated[float, within(above=0, most=1)]
TYPES: Mapping[Any, tuple[Callable[[Any], bool], str]] = {
    int: (lambda value: isinstance(value, Integral), "be a whole number"),
    float: (lambda value: isinstance(value, Real) and math.isfinite(value), "be a finite number"),
    str: (lambda value: isinstance(value, str), "be a text"),
    bool: (lambda value: isinstance(value, bool), "be true or false"),
}


def check_fields(owner: Any, group: str) -> None:
    """ConfigurationError: fields of `owner`, whose keys in `group` these are, break their rules; each is named."""
    if problems := broken_rules(owner, group):
        raise ConfigurationError(*problems)


def broken_rules(owner: Any, group: str) -> list[str]:
    """The problem of each field of `owner` that breaks its rule; its key in `group` is the field's name."""
    if not is_dataclass(owner):
        return [f"{group}={shown(owner)}: must be the name of a preset, or an object as besa_exp.preset makes it"]
    prefix, hints = f"{group}." if group else "", ruled_hints(type(owner))
    found = [
        broken_rule(field, hints[field.name], getattr(owner, field.name), prefix + field.name)
        for field in fields(owner)
    ]
    return [problem for problem in found if problem]


def broken_rule(field: Field, hint: Any, value: Any, key: str) -> str | None:
    """The problem of the field that `key` sets, with the field's default as the remedy; None: there is none."""
    if (said := _broken(value, hint)) is None:
        return None
    remedy = "" if field.default in (MISSING, None, ()) else f"; write for example {key}={shown(field.default)}"
    return f"{key}={shown(value)}: must {said}{remedy}"


@cache
def ruled_hints(cls: type) -> Mapping[str, Any]:
    """The type hint of each field, with its rule."""
    return get_type_hints(cls, include_extras=True)


def _broken(value: Any, hint: Any) -> str | None:
    """What a value must be and is not, by the type and the rule in its hint; so must each part of a list."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in TYPES:
        fits, said = TYPES[hint]
        return None if fits(value) and isinstance(value, bool) == (hint is bool) else said
    if origin is Annotated:
        return _broken(value, inner[0]) or (None if inner[1].holds(value) else inner[1].said)
    if origin is Literal:
        return None if value in inner else one_of(*map(str, inner)).said
    if origin is dict and not isinstance(value, Mapping):
        return "be a table of keys and values"
    if origin in (tuple, dict):
        parts = value.values() if origin is dict else value if isinstance(value, list | tuple) else [value]
        return next(filter(None, (_broken(part, inner[origin is dict]) for part in parts)), None)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        found = [_broken(value, option) for option in inner if option is not type(None)]
        return ", or ".join(filter(None, found)) if all(found) else None
    if is_dataclass(hint) and not isinstance(value, hint):  # type: ignore[arg-type]
        return f"be {getattr(hint, '__name__', hint)}, or the name of a preset"
    return None


def shown(value: Any) -> str:
    """As a person writes it: `null`, `true`, `[1,2]`; a text that would be read as a number, in quotes."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    if isinstance(value, str):
        return f"'{value}'" if NUMBER.fullmatch(value) else value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
