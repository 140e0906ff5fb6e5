"""What a command prints its tables on, and a colour for how much was lost against the dense model."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable

from rich.console import Console

LITTLE, MUCH = 0.05, 0.20  # of a perplexity, relative
LITTLE_ACCURACY, MUCH_ACCURACY = 0.01, 0.05  # of an accuracy, in itself


def console_of(plain_width: int) -> Console:
    """Standard output, as wide as the terminal is, or `plain_width` columns where it is none."""
    return Console(width=None if sys.stdout.isatty() else plain_width, highlight=False, emoji=False)


def counted(states: Iterable[str]) -> str:
    """`3 done, 1 failed`, in the order in which they come first."""
    return ", ".join(f"{number} {state}" for state, number in Counter(states).items())


def colour_of_loss(loss: float, accuracy: bool = False) -> str:
    """Green for little, yellow, red for much."""
    little, much = (LITTLE_ACCURACY, MUCH_ACCURACY) if accuracy else (LITTLE, MUCH)
    return "green" if loss <= little else "yellow" if loss <= much else "red"
