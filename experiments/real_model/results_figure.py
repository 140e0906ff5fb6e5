"""The study's figure for README, docs/results.svg: perplexity against sparsity, written as text, so that the same
records give the same bytes whatever is installed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from besa_exp.report.methods import CHOSEN, COLOURS

WIDTH, HEIGHT = 800, 396
LEFT, RIGHT, TOP, BOTTOM = 64, 620, 46, 344  # of the plot, in pixels
LEAST, MOST = 20.0, 800.0  # perplexity at its lower and upper edge
X = (0.48, 0.82)  # sparsity at its left and right edge
TICKS = (20, 30, 50, 100, 200, 400, 800)
MEASURE = "tokens/wikitext2.safetensors"
METHODS = ("wanda", "sparsegpt", "besa_paper", "besa", "besa, scope=model", "best")
COLOUR_OF = {method: COLOURS[CHOSEN[method][0]][0] for method in METHODS if method in CHOSEN} | {
    "besa, scope=model": COLOURS["violet"][0]
}

Point = tuple[float, float]
"""A measured sparsity and the mean perplexity there."""


def points_of(rows: Sequence[Mapping[str, Any]], method: str) -> list[Point]:
    """The unstructured runs of a method, a point for each target: means over seeds."""
    own = [
        row
        for row in rows
        if (row["method"], row["pattern"]) == (method, "unstructured") and row["scores"].get(MEASURE)
    ]
    by_target = {target: [row for row in own if row["target"] == target] for target in {row["target"] for row in own}}
    return [
        (statistics.mean(row["measured"] for row in runs), statistics.mean(row["scores"][MEASURE] for row in runs))
        for _, runs in sorted(by_target.items())
    ]


def place(point: Point) -> Point:
    """Pixels from the top left; the perplexity's axis is logarithmic."""
    x = LEFT + (point[0] - X[0]) / (X[1] - X[0]) * (RIGHT - LEFT)
    y = BOTTOM - math.log(point[1] / LEAST) / math.log(MOST / LEAST) * (BOTTOM - TOP)
    return round(x, 1), round(y, 1)


def figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """The SVG's text."""
    dense = next(row["scores"][MEASURE] for row in rows if row["method"] == "dense" and MEASURE in row["scores"])
    curves = {method: points_of(rows, method) for method in METHODS}
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#1f2937" role="img">',
            "<title>Perplexity of SmolLM2-135M-Instruct on WikiText-2 against sparsity, by pruning method</title>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            f'<clipPath id="plot"><path d="M{LEFT} {TOP}H{RIGHT}V{HEIGHT}H{LEFT}Z"/></clipPath>',
            f'<text x="{LEFT}" y="24">WikiText-2 perplexity of SmolLM2-135M-Instruct (lower is better)</text>',
            *_axes(),
            *_dense(dense),
            *(line for method, points in curves.items() for line in _curve(points, COLOUR_OF[method])),
            *_legend(curves),
            "</svg>\n",
        ]
    )


def _axes() -> list[str]:
    lines = []
    for tick in TICKS:
        _, y = place((X[0], tick))
        lines.append(f'<path d="M{LEFT} {y}H{RIGHT}" stroke="#e5e7eb"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:g}" text-anchor="end">{tick}</text>')
    for target in (0.5, 0.6, 0.7, 0.8):
        x, _ = place((target, LEAST))
        lines.append(f'<text x="{x}" y="{BOTTOM + 22}" text-anchor="middle">{target:.0%}</text>'.replace("%", " %"))
    middle = (LEFT + RIGHT) / 2
    return [*lines, f'<text x="{middle:g}" y="{BOTTOM + 44}" text-anchor="middle">weights that are zero</text>']


def _dense(perplexity: float) -> list[str]:
    _, y = place((X[0], perplexity))
    return [
        f'<path d="M{LEFT} {y}H{RIGHT}" stroke="{COLOURS["grey"][0]}" stroke-dasharray="5 4"/>',
        f'<text x="{RIGHT + 16}" y="{y + 4:g}" fill="{COLOURS["grey"][0]}">dense, {perplexity:.2f}</text>',
    ]


def _curve(points: Sequence[Point], colour: str) -> list[str]:
    """A line with a dot at each run; what lies above the plot leaves it, with its value at the edge."""
    placed = [place(point) for point in points]
    path = "L".join(f"{x} {y}" for x, y in placed)
    dots = [f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>' for x, y in placed if y >= TOP]
    above = [
        f'<text x="{x}" y="{TOP + 12}" text-anchor="middle" fill="{colour}">↑ {value:,.0f}</text>'
        for (x, y), (_, value) in zip(placed, points, strict=True)
        if y < TOP
    ]
    line = f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2" clip-path="url(#plot)"/>'
    return [line, *dots, *above]


def _legend(curves: Mapping[str, Sequence[Point]]) -> list[str]:
    """From the worst at 60 % to the best, as the lines stand one above the other."""
    at_60 = {method: min(points, key=lambda point: abs(point[0] - 0.6))[1] for method, points in curves.items()}
    lines = []
    for number, method in enumerate(sorted(curves, key=lambda name: -at_60[name])):
        colour, y = COLOUR_OF[method], TOP + 34 + 26 * number
        lines.append(f'<path d="M{RIGHT + 16} {y}h20" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<circle cx="{RIGHT + 26}" cy="{y}" r="4" fill="{colour}"/>')
        lines.append(f'<text x="{RIGHT + 42}" y="{y + 4}" fill="{colour}">{escape(method)}</text>')
    return lines
