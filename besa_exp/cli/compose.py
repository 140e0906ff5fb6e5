"""What stands on the command line as key=value: read, checked against the presets and keys there are, and spread into
jobs as Hydra's basic sweeper does it.

Hydra stops at the first thing it cannot use and does not say what was meant; here every one is found, with the nearest
valid name. A line's key is what stands before its `=`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import compose
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from besa_exp.cli.text_keys import list_keys, text_keys
from besa_exp.errors import ConfigurationError, did_you_mean, quoted, what_needs_quotes
from besa_exp.presets import CONF_DIR, METHOD_GROUPS, groups


@dataclass
class Composer:
    """Composes the configuration of override lines; Hydra must be initialized.

    `search_path` are the lines that add folders of presets, `beside` is that of --config-dir. `problems` maps an
    override's key to what is wrong with it; a line whose key is there is left out of what is composed, so that it hides
    no other problem."""

    config_name: str
    search_path: tuple[str, ...] = ()
    beside: Path | None = None
    problems: dict[str, str] = field(default_factory=dict)

    @cached_property
    def parser(self) -> OverridesParser:
        return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())

    @cached_property
    def repository(self) -> IConfigRepository:
        """All presets, read once: `get_group_options` of Hydra's loader would read them anew for each key."""
        loader: Any = GlobalHydra.instance().config_loader()
        return loader._parse_overrides_and_create_caching_repo(self.config_name, list(self.search_path))[1]

    def parse(self, lines: Sequence[str]) -> list[Override]:
        """The lines that can be read and choose no preset that does not exist; the others become problems."""
        overrides = []
        for line in lines:
            try:
                overrides.extend(self.parser.parse_overrides([line]))
            except OverrideParseException as error:
                self.problems[line] = self._unparsed(line, error)
        self.problems.update(filter(None, map(self._unknown_preset, overrides)))
        self.problems.update(filter(None, map(_another_class, overrides)))
        self.problems.update(filter(None, map(_chosen_again, overrides)))
        return [override for override in overrides if override.key_or_group.split(".")[0] not in self.problems]

    def spread(self, overrides: Sequence[Override], params: Sequence[str]) -> list[list[str]]:
        """The lines of each job of a sweep, in Hydra's order. `params` are the sweeper's own lines; the command line
        wins over them."""
        swept = self.parser.parse_overrides(list(params))
        task = [override for override in overrides if not override.is_hydra_override()]
        own = [str(override.input_line) for override in overrides if override.is_hydra_override()]
        return [[*own, *lines] for lines in BasicSweeper.split_arguments([*swept, *task], None)[0]]

    def compose(self, lines: Sequence[str]) -> DictConfig | None:
        """The configuration, Hydra's own node included; None, and a problem noted, where it cannot be composed."""
        lines = [line for line in lines if key_of(line) not in self.problems]
        try:
            config = compose(self.config_name, [*lines, *self.search_path], return_hydra_config=True)
            self.problems |= self._taken_from_us(config.hydra.runtime.choices)
            return config
        except yaml.YAMLError as error:  # of a preset of one's own
            self.problems.setdefault("composition", "; ".join(map(str.strip, str(error).splitlines())))
            return None
        except (HydraException, OmegaConfBaseException) as error:
            found = self._unknown_keys(lines)
            if not found:
                self.problems.setdefault("composition", _message(error))
                return None
        self.problems |= found
        return self.compose(lines)

    def without(
        self, lines: Sequence[str], keys: Iterable[str], config: DictConfig
    ) -> tuple[list[str], DictConfig | None]:
        """The lines that give no value to any of the keys, nor to what is below them, and their configuration: `config`
        where that are all, None where they do not compose. A line that chooses a preset stays."""
        rest = [line for line in lines if not any(self._sets(line, key) for key in keys)]
        return rest, self.compose(rest) if len(rest) < len(lines) else config

    def note(self, problems: Iterable[str]) -> None:
        """Of no key in particular."""
        self.problems |= {problem: problem for problem in problems}

    def refuse(self) -> NoReturn:
        """ConfigurationError: every problem there is, each once."""
        raise ConfigurationError(*dict.fromkeys(self.problems.values()))

    def _sets(self, line: str, key: str) -> bool:
        own = key_of(line)
        return own.startswith(f"{key}.") or (own == key and not self.presets(own))

    def presets(self, group: str) -> list[str]:
        """The presets of a group; none where there is no such group."""
        return self.repository.get_group_options(group, ObjectType.CONFIG)

    def _taken_from_us(self, choices: Mapping[str, Any]) -> dict[str, str]:
        """Chosen presets of `beside` that are not read, as ours have their names."""
        names = [f"{group}/{name}.yaml" for group, name in choices.items()]
        return {
            name: f"{self.beside / name}: is not read, as the package has a preset of this name; give it another name"
            for name in names
            if self.beside and (self.beside / name).is_file() and (CONF_DIR / name).is_file()
        }

    def _unparsed(self, line: str, error: OverrideParseException) -> str:
        key, equals, value = line.partition("=")
        if equals and key and (odd := what_needs_quotes(value)):
            return (
                f"{line}: {odd} in a value stands in quotes, two for the shell and two for Hydra: {quoted(key, value)}"
            )
        if equals:
            return f"{line}: cannot be read ({str(error).splitlines()[0].rstrip('.')}); arguments are written key=value"
        there = GlobalHydra.instance().config_loader().list_groups("")
        meant = [f"{group}={line}" for group in there if group != "hydra" and line in self.presets(group)]
        return f"{line}: arguments are written key=value" + (f" (did you mean {' or '.join(meant)}?)" if meant else "")

    def _unknown_preset(self, override: Override) -> tuple[str, str] | None:
        group = override.key_or_group
        valid = self.presets(group)
        wrong = [] if not valid or override.is_delete() else [name for name in _chosen(override) if name not in valid]
        if not wrong:
            return None
        near = did_you_mean(str(wrong[0]), valid)
        if wrong[0] == "null":
            near = f"; none is chosen where {group} is left out, or taken back with ~{group}"
        return group, f"{group}={wrong[0]}: no such preset{near}; presets of {group}: {', '.join(valid)}"

    def _unknown_keys(self, lines: Sequence[str]) -> dict[str, str]:
        """Keys that are not in the configuration which the chosen presets make."""
        choices = [line for line in lines if self.presets(key_of(line)) or key_of(line) == "hydra.mode"]
        try:
            config = compose(self.config_name, [*choices, *self.search_path], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException):
            return {}
        changed = [key_of(line) for line in lines if line not in choices and not line.startswith(("+", "~"))]
        messages = {key: _unknown_key(config, key) for key in changed}
        return {key: message for key, message in messages.items() if message}


def _another_class(override: Override) -> tuple[str, str] | None:
    """The problem of a method's class as a key: runs are told apart by its preset's name, and never by the class."""
    group, _, rest = override.key_or_group.partition(".")
    if group not in METHOD_GROUPS or rest != "_target_":
        return None
    rule = "a preset names its class; write a preset of your own with this _target_, see docs/extending.md"
    return override.key_or_group, f"{override.input_line}: {rule}"


def _chosen_again(override: Override) -> tuple[str, str] | None:
    """The problem of a + before one of our groups: each has its place already, though it may be empty."""
    line, group = str(override.input_line), override.key_or_group
    if not line.startswith("+") or group not in groups():
        return None
    return group, f"{line}: a preset is chosen without +: {line.lstrip('+')}"


def told_sweep(override: Override, rule: str) -> str:
    """The problem of several values where one is asked for. A comma may be part of a text, or a list be meant."""
    line = str(override.input_line)
    key, _, value = line.partition("=")
    if "," not in value or key not in text_keys():
        return f"{line}: several values; {rule}"
    meant = f"a list stands in brackets: {shlex.quote(f'{key}=[{value}]')}"
    if key not in list_keys():
        meant = f"where it is part of one value, that stands in quotes: {quoted(key, value)}"
    return f"{line}: the comma makes it several values; {rule}; {meant}"


def key_of(line: str) -> str:
    """The key of an override line, without the marks of adding and deleting."""
    return line.split("=", 1)[0].lstrip("+~")


def _chosen(override: Override) -> Iterator[object]:
    value = override.value()
    if override.is_sweep_override():
        yield from override.sweep_string_iterator() if override.is_discrete_sweep() else ()
    elif isinstance(value, list):
        yield from value
    else:
        yield "null" if value is None else value  # Hydra knows no way to choose nothing


def _unknown_key(config: DictConfig, key: str) -> str | None:
    node, parents = config, []
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node.keys():  # noqa: SIM118 - `in node` denies what has no value
            break
        node = node._get_node(part)
        parents.append(part)
    else:
        return None
    choices = config.hydra.runtime.choices
    absent = [] if parents else [str(group) for group in choices if "/" not in group and group not in config]
    # Unresolved, as what an interpolation stands for may be missing.
    own = {str(name): config._get_node(name) for name in config if key.startswith("hydra.") or name != "hydra"}
    names = [*_dotted_keys(own), *absent]
    same_end = [name for name in names if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    where = ".".join(parents)
    beside = [str(name) for name in node if name not in ("_target_", "hydra")] if isinstance(node, DictConfig) else []
    beside += absent
    near = did_you_mean(key.rsplit(".", 1)[-1], beside, f"{where}.") if where else did_you_mean(key, names)
    if same_end:
        near = f" (did you mean {' or '.join(same_end)}?)"
    choice = choices.get(where)
    of = (f" of {where}={choice}" if choice else f" of {where}") if where else ""
    apart = choice and config.hydra.mode == RunMode.MULTIRUN
    remedy = f"; sweep the presets of {where} that have it in a command of their own" if apart else ""
    return f"{key}: no such key{near}; keys{of}: {', '.join(beside) or 'none'}{remedy}"


def _dotted_keys(node, prefix: str = "") -> Iterator[str]:
    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key) if OmegaConf.is_config(node) else node[key]
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _dotted_keys(child, f"{prefix}{key}.")


def _message(error: Exception) -> str:
    """A Hydra error as one line."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    lines = f"{error}\n{cause or ''}".splitlines()
    return "; ".join(line.strip().rstrip(":") for line in lines if line.strip())
