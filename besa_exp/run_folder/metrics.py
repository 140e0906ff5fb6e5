"""metrics.jsonl of a run folder, read line by line. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"


def metric_lines(folder: Path, kind: str = "") -> Iterator[dict[str, Any]]:
    """The objects of one kind, or of all, in order; none where there is no file. What was cut off is left out."""
    begins = f'{{"kind": "{kind}"'.encode() if kind else b""
    with suppress(FileNotFoundError), (folder / NAME).open("rb") as file:
        for line in file:
            if line.startswith(begins):
                with suppress(ValueError):
                    yield json.loads(line)
