"""What the page draws of metrics.jsonl: loss curves, thinned so that only so many lines are parsed, whatever its
length, and quantiles over the sparsities of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from besa_exp.run_folder.folder import METRICS, metric_lines

ROWS = ("block", "linears")
LINES = 512  # parsed of one file; a curve has no more points than that


@dataclass(frozen=True)
class Curve:
    """Every `stride`-th line's step: (block, step, loss, reconstruction, expected sparsity), in order.
    `recovery`: its steps, (step, loss, held-out loss or None), every one that was judged."""

    stride: int
    points: tuple[tuple[int, int, float, float, float], ...]
    recovery: tuple[tuple[int, float, float | None], ...] = ()


def read_curve(folder: Path) -> Curve:
    """The steps of one run; none for a method that takes none, or where the file is not there."""
    try:
        recorded = (folder / METRICS).read_bytes().splitlines()
    except OSError:
        return Curve(1, ())
    steps = [line for line in recorded if line.startswith(b'{"kind": "step"')]
    recovery = [line for line in recorded if line.startswith(b'{"kind": "recovery_step"')]
    stride, every = (max(1, -(-len(found) // LINES)) for found in (steps, recovery))
    judged = [line for at, line in enumerate(recovery) if at % every == 0 or b'"held_out": null' not in line]
    points = _values(steps[::stride], "block", "step", "loss", "reconstruction", "expected_sparsity")
    return Curve(stride, tuple(points), tuple(_values(judged, "step", "loss", "held_out")))


def row_quantiles(folder: Path) -> list[dict[str, Any]]:
    """For each block its number and {linear: quantiles over the sparsities of its rows}; [] for a run that kept
    none."""
    found = {}
    with suppress(OSError):
        found = {line["block"]: {key: line[key] for key in ROWS} for line in metric_lines(folder, "rows")}
    return [found[block] for block in sorted(found)]


def _values(lines: Sequence[bytes], *keys: str) -> Iterator[Any]:
    for line in lines:
        with suppress(ValueError, KeyError):  # a last line that was cut off
            step = json.loads(line)
            yield tuple(step[key] for key in keys)
