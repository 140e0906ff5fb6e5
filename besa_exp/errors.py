"""Errors that reach a person. Each says what is wrong, where, the rule, and the remedy, in one message."""

from __future__ import annotations

import difflib
import logging
import re
import shlex
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)
# Characters of a value that Hydra reads without quotes, as such or between others.
UNQUOTED = re.compile(r"[\w/\-\\+.$%*@?|:, ]", re.ASCII)
NAMES = {"'": "a quote", '"': "a quote"}


class ConfigurationError(ValueError):
    """The request cannot be carried out as it is written; found before any long work. Exit code 2.

    `problems` holds one complete sentence or more for each problem, so that all are shown together."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(RuntimeError):
    """A run that had begun cannot go on: the block and linear are named. Exit code 1."""


class Interrupted(SystemExit):
    """The system asked the process to end (SIGTERM, or SIGUSR1 before a pre-emption). Exit code 143; the same command
    goes on after what is finished."""

    def __init__(self, signal_name: str):
        super().__init__(143)
        self.signal_name = signal_name

    def __str__(self) -> str:
        return f"{self.signal_name} received; run the same command again to resume after what is finished"


class Unavailable(Exception):
    """A data set or task that cannot be loaded here; the run records the reason as n/a and continues."""


def first_line(error: Exception) -> str:
    """What another library's error says, short enough to be part of a message: its type and its first line, with the
    next one where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextmanager
def as_unavailable() -> Iterator[None]:
    """Turns any error raised inside into Unavailable with its reason: other sets and tasks are still scored.

    A reason that was written for a person stays as it is; any other error is named by its type, its first line and the
    file and line that raised it, and its traceback goes to run.log."""
    try:
        yield
    except Unavailable:
        raise
    except ConfigurationError as error:
        raise Unavailable(str(error)) from error
    except Exception as error:  # whatever a library raises for one set, the others are worth scoring
        logger.info("what was raised:\n%s", "".join(traceback.format_exception(error)).rstrip())
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise Unavailable(f"{first_line(error)} ({Path(place.filename).name}, line {place.lineno})") from error


def did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> str:
    """` (did you mean X?)`, or nothing where no name is near. `prefix` is put before the name that is shown."""
    valid = sorted(set(names))
    folded = {name.lower().replace("-", "_"): name for name in valid}
    near = difflib.get_close_matches(word.lower().replace("-", "_"), folded, n=1, cutoff=0.5)
    return f" (did you mean {prefix}{folded[near[0]]}?)" if near else ""


def did_you_mean_one_of(word: str, names: Iterable[str]) -> str:
    """As `did_you_mean`, with up to three names; those that go on where `word` ends come first, in the order given."""
    valid = list(dict.fromkeys(names))
    longer = [name for name in valid if name.startswith(f"{word}_")]
    near = difflib.get_close_matches(word, valid, n=3, cutoff=0.5)
    found = list(dict.fromkeys([*longer[:2], *near, *longer]))[:3]
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def quoted(key: str, value: str) -> str:
    """`key=value` as a shell takes it, the value in quotes of Hydra's."""
    inner = value.replace("\\", "\\\\").replace('"', '\\"') if '"' in value else value
    return shlex.quote(f'{key}="{inner}"')


def what_needs_quotes(value: str) -> str | None:
    """The first character of a value that only stands in quotes, in words; None: there is none."""
    found = next((letter for letter in value if not UNQUOTED.fullmatch(letter)), None)
    return NAMES.get(found, found) if found else None


def argument(key: str, value: str) -> str:
    """`key=value` as it is typed, in quotes where it needs them."""
    return quoted(key, value) if what_needs_quotes(value) or "," in value else f"{key}={shlex.quote(value)}"
