"""Errors that reach a person. Each says what is wrong, where, the rule, and the remedy, in one message."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """The request cannot be carried out as written; found before any long work. Exit code 2.

    `problems` holds one complete sentence or more for each problem, so that all are shown together."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(RuntimeError):
    """A run that had begun cannot go on: the block and linear are named. Exit code 1."""


class Interrupted(SystemExit):
    """The system asked the process to end (SIGTERM, or SIGUSR1 before a pre-emption). Exit code 143; the same command
    goes on after the last whole block."""

    def __init__(self, signal_name: str):
        super().__init__(143)
        self.signal_name = signal_name

    def __str__(self) -> str:
        return f"{self.signal_name} received; the same command goes on after the last whole block"


class Unavailable(Exception):
    """A data set or task that cannot be had here; the run records the reason as n/a and goes on."""


def first_line(error: Exception) -> str:
    """What another library's error says, short enough to be part of a message: its type and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
