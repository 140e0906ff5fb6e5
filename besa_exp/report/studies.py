"""What the studies under experiments/ share: records that outlive their run folders, and cells over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def kept_records(path: Path, found: Iterable[Record], request: Callable[[Record], tuple]) -> list[Record]:
    """What the JSON file `path` holds together with what was `found`, ordered by `request`, and written there.

    Of two records of one request, the same run wherever it was made, the one that was found stays."""
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    by_request = {request(record): record for record in [*recorded, *found]}
    records = [by_request[key] for key in sorted(by_request, key=str)]
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n", encoding="utf-8")
    return records


def over_seeds(values: Sequence[float | None], digits: int, seeds: int = 3) -> str:
    """Mean and, of several, the sample standard deviation; in brackets how many, where they are fewer than `seeds`.

    What is None does not count; without any: n/a."""
    found = [value for value in values if value is not None]
    if not found:
        return "n/a"
    mean = statistics.mean(found)
    digits = 0 if mean >= 1000 else digits
    spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{mean:.{digits}f}{spread}{f' ({len(found)})' if len(found) < seeds else ''}"
