"""Plain values from configuration into frozen dataclasses, checked against the dataclass's own type hints and rules.

Every problem is collected with the key it belongs to, so that all are reported together and none hides another.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pkgutil import resolve_name
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from besa_exp.errors import did_you_mean
from besa_exp.presets import METHOD_GROUPS
from besa_exp.rules import broken_rule, ruled_hints, shown

MISSING_VALUE = "???"  # what OmegaConf calls a value that the user must give
SCALARS = (bool, int, float, str)
LARGEST = 2**63 - 1
MAY_BE_EMPTY = ("model.path", "model.name")  # here: the one is checked as a place, the other made of it
UNREAD = object()  # stands for a value that could not be read


class Reader:
    """Reads values and remembers what is wrong with them: `problems` is {dotted key: message}."""

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}

    def refuse(self, key: str, message: str) -> Any:
        """Record a problem; the first one of a key stands."""
        self.problems.setdefault(key, message)
        return UNREAD

    def value(self, value: Any, hint: Any, key: str) -> Any:
        """`value` as the type `hint`, or UNREAD."""
        origin = get_origin(hint)
        if isinstance(value, str) and value == MISSING_VALUE:
            return self.refuse(key, f"{key}: no value given, and there is no default; add {key}=...")
        if origin in (Union, types.UnionType):
            return self._optional(value, get_args(hint), key)
        if origin is Literal:
            return self._choice(value, get_args(hint), key)
        if origin is tuple:
            return self._tuple(value, get_args(hint)[0], key)
        if origin is dict:
            return self._mapping(value, get_args(hint), key)
        if is_dataclass(hint) or (isinstance(value, Mapping) and "_target_" in value):
            return self.node(value, hint, key)
        if hint is Any:
            return self.node(value, hint, key) if isinstance(value, Mapping) and key in METHOD_GROUPS else value
        return self._scalar(value, hint, key)

    def node(self, node: Any, hint: Any, key: str, given: Mapping[str, Any] | None = None) -> Any:
        """An instance of the dataclass that the mapping `node` names by `_target_`, else of `hint`.

        `given` are fields that come from elsewhere. What `__post_init__` refuses is a problem of `key`."""
        if not isinstance(node, Mapping):
            return self.refuse(key, f"{key}={shown(node)}: must be a group of keys; choose a preset of {key}")
        cls = self._class(node.get("_target_"), hint, key)
        if cls is UNREAD:
            return UNREAD
        known = {field.name: field for field in fields(cls) if field.init and field.name not in (given or {})}
        try:
            hints, ruled = get_type_hints(cls), ruled_hints(cls)
        except (NameError, TypeError) as error:
            return self.refuse(key, f"{key}._target_={node['_target_']}: its fields' types cannot be read ({error})")
        values: dict[str, Any] = dict(given or {})
        named = [
            field.name for field in fields(cls) if field.name in (*known, *METHOD_GROUPS)
        ]  # read, or left out here
        for name, value in node.items():
            if name == "_target_":
                continue
            path = f"{key}.{name}" if key else str(name)
            if name not in known:
                self.refuse(path, f"{path}: no such key{did_you_mean(str(name), named)}; keys: {', '.join(named)}")
            elif isinstance(value, str) and not value.strip() and path not in MAY_BE_EMPTY:
                needed = known[name].default is MISSING and known[name].default_factory is MISSING
                rule = "is empty; give a text" + ("" if needed else ", or leave the key out")
                values[name] = self.refuse(path, f"{path}={value}: {rule}")
            else:
                read = self.value(value, hints[name], path)
                broken = None if read is UNREAD else broken_rule(known[name], ruled[name], read, path)
                values[name] = self.refuse(path, broken) if broken else read
        for name, field in known.items():
            if name not in values and field.default is MISSING and field.default_factory is MISSING:
                path = f"{key}.{name}" if key else name
                values[name] = self.value(MISSING_VALUE, str, path)
        if any(value is UNREAD for value in values.values()):
            return UNREAD
        try:
            return cls(**values)
        except ValueError as error:
            return self.refuse(key, str(error))
        except Exception as error:  # noqa: BLE001 - a preset's class may be anybody's
            return self.refuse(key, f"{key}: {cls.__name__} cannot be made ({type(error).__name__}: {error})")

    def _class(self, target: str | None, hint: Any, key: str) -> Any:
        if target is None:
            return hint if is_dataclass(hint) else self.refuse(key, f"{key}: its preset lacks _target_, a dataclass")
        try:
            cls = resolve_name(target)
        except Exception as error:  # noqa: BLE001 - importing a module runs it
            return self.refuse(
                key,
                f"{key}._target_={target}: cannot be imported ({error}); name a dataclass of a module on PYTHONPATH",
            )
        wanted: type = hint if isinstance(hint, type) and is_dataclass(hint) else object
        if is_dataclass(cls) and isinstance(cls, type) and issubclass(cls, wanted):
            return cls
        rule = "a dataclass" if wanted is object else wanted.__name__
        return self.refuse(key, f"{key}._target_={target}: must be {rule}; choose a preset of {key}")

    def _optional(self, value: Any, options: tuple[Any, ...], key: str) -> Any:
        if value is None and type(None) in options:
            return None
        words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
        if value in words:
            return value
        (hint,) = (option for option in options if option is not type(None) and get_origin(option) is not Literal)
        if words and hint not in SCALARS:  # an object, or the name of one
            return self.node(value, hint, key) if isinstance(value, Mapping) else self._choice(value, tuple(words), key)
        return self._scalar(value, hint, key, words) if words else self.value(value, hint, key)

    def _choice(self, value: Any, choices: tuple[Any, ...], key: str) -> Any:
        if value in choices:
            return value
        names = [str(choice) for choice in choices]
        near = did_you_mean(str(value), names)
        return self.refuse(key, f"{key}={shown(value)}: must be one of {', '.join(names)}{near}")

    def _tuple(self, value: Any, hint: Any, key: str) -> Any:
        values = value if isinstance(value, list | tuple) else [value]
        read = tuple(self.value(item, hint, key) for item in values)
        return UNREAD if UNREAD in read else read

    def _mapping(self, value: Any, hints: tuple[Any, ...], key: str) -> Any:
        """Keys that stand for numbers may be written as text, as they are on the command line and in JSON."""
        if not isinstance(value, Mapping):
            return self.refuse(key, f"{key}={shown(value)}: must be a group of keys, or {{}}")
        (key_hint, hint), read = hints, {}
        for name, item in value.items():
            path = f"{key}.{name}"
            number = int(name) if key_hint is int and str(name).isdecimal() else name
            read[self._scalar(number, key_hint, path)] = self.value(item, hint, path)
        return UNREAD if UNREAD in read or any(item is UNREAD for item in read.values()) else read

    def _scalar(self, value: Any, hint: type, key: str, words: Sequence[str] = ()) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if hint is bool and isinstance(value, bool):
            return value
        if hint is int and number and float(value).is_integer():
            if abs(value) <= LARGEST:
                return int(value)
            return self.refuse(key, f"{key}={value}: must be at most 2^63 - 1, as no tensor counts further")
        if hint is float and number and math.isfinite(value):
            return float(value)
        if hint is str and isinstance(value, str):
            return value
        if hint is str and number:  # 2024_05_01 is the number 20240501: what was written is lost
            example = f"{key.rpartition('.')[2]}: '{value}'"
            return self.refuse(key, f"{key}={value}: must be a text, not a number; write it in quotes: {example}")
        rule = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}[hint]
        rule, example = " or ".join([rule, *words]), {bool: "true", int: "8", float: "0.5", str: "name"}[hint]
        return self.refuse(key, f"{key}={shown(value)}: must be {rule}; write for example {key}={example}")
