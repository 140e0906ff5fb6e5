"""Markdown: tables, and names as text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> list[str]:
    """The lines of a table; with `numbers` all columns but the first are set to the right."""
    rule = "|---" + ("|---:" if numbers else "|---") * (len(head) - 1) + "|"
    return [_line(head), rule, *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    """One line that Markdown, and the HTML that may stand in it, take as it is: a name is no tag and no link."""
    marked = re.sub(r"[\\|*`\[]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(text.split()))
    return html.escape(marked, quote=False)
