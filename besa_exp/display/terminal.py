"""What a command prints its tables on."""

from __future__ import annotations

import sys

from rich.console import Console


def console_of(plain_width: int) -> Console:
    """Standard output, as wide as the terminal is, or `plain_width` columns where it is none."""
    return Console(width=None if sys.stdout.isatty() else plain_width, highlight=False, emoji=False)
