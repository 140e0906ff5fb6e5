"""How sparse the rows of each linear are: quantiles over its rows, as a run's metrics.jsonl keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def row_quantiles(folder: Path) -> list[dict[str, Mapping[str, Sequence[float]]]]:
    """For each block {linear: the QUANTILES of its rows' sparsities}; [] for a run that kept none."""
    found: dict[int, dict[str, Mapping[str, Sequence[float]]]] = {}
    with suppress(OSError), (folder / "metrics.jsonl").open(encoding="utf-8") as file:
        for line in file:
            if line.startswith('{"kind": "rows"'):
                with suppress(ValueError, KeyError):
                    read = json.loads(line)
                    found[read["block"]] = {"block": read["block"], "linears": read["linears"]}
    return [found[block] for block in sorted(found)]
