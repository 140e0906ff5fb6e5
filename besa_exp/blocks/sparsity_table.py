"""Sparsity by block and linear type, read from the `blocks` of results.json: as console and model card show it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def linear_type(name: str) -> str:
    """The path of a linear without its numbers: `mlp.experts.3.w1` and `mlp.experts.4.w1` are `mlp.experts.w1`."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def type_counts(blocks: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Weights and pruned weights of each linear type over `blocks`, types in order of appearance."""
    counts: dict[str, tuple[int, int]] = {}
    for block in blocks:
        for name, linear in block["linears"].items():
            weights, pruned = counts.get(linear_type(name), (0, 0))
            counts[linear_type(name)] = (weights + linear["weights"], pruned + linear["pruned"])
    return counts


def block_counts(block: Mapping[str, Any]) -> tuple[int, int]:
    linears = block["linears"].values()
    return sum(linear["weights"] for linear in linears), sum(linear["pruned"] for linear in linears)


def short_names(types: Iterable[str]) -> dict[str, str]:
    """Column heads: the last part of each path without `_proj`, where all stay different; else the paths themselves."""
    paths = list(types)
    short = [path.rpartition(".")[2].removesuffix("_proj") for path in paths]
    return dict(zip(paths, short if len(set(short)) == len(short) else paths, strict=True))
