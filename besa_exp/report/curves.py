"""Loss curves, thinned: of metrics.jsonl only so many lines are parsed, whatever its length."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LINES = 512  # parsed of one file; a curve has no more points than that


@dataclass(frozen=True)
class Curve:
    """Every `stride`-th line's step: (block, step, loss, reconstruction, expected sparsity), in order.
    `recovery`: its steps, (step, loss, held-out loss or None), every one that was judged."""

    stride: int
    points: tuple[tuple[int, int, float, float, float], ...]
    recovery: tuple[tuple[int, float, float | None], ...] = ()


def read_curve(folder: Path, lines: int = LINES) -> Curve:
    """The steps of one run; none for a method that takes none, or where the file is not there."""
    try:
        recorded = (folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return Curve(1, ())
    steps = [line for line in recorded if line.startswith(b'{"kind": "step"')]
    stride = max(1, -(-len(steps) // lines))
    points = []
    for line in steps[::stride]:
        try:
            step = json.loads(line)
            points.append(
                (step["block"], step["step"], step["loss"], step["reconstruction"], step["expected_sparsity"])
            )
        except (ValueError, KeyError):  # a last line that was cut off
            continue
    return Curve(stride, tuple(points), tuple(_recovery(recorded, lines)))


def _recovery(recorded: Sequence[bytes], lines: int) -> Iterator[tuple[int, float, float | None]]:
    steps = [line for line in recorded if line.startswith(b'{"kind": "recovery_step"')]
    stride = max(1, -(-len(steps) // lines))
    for number, line in enumerate(steps):
        if number % stride == 0 or b'"held_out": null' not in line:
            with suppress(ValueError, KeyError):  # a last line that was cut off
                step = json.loads(line)
                yield step["step"], step["loss"], step["held_out"]
