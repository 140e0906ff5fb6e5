"""What the model goes on with after each prompt, beside the dense one where that was asked too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_table(results: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows from a results.json; no rows where there are no samples."""
    own, dense = results.get("texts") or {}, (results.get("dense") or {}).get("texts") or {}
    name = "pruned" if "pruner" in results else "model"
    beside = bool(dense) and dense != own
    rows = [(prompt, *((dense.get(prompt, ""),) if beside else ()), text) for prompt, text in own.items()]
    return ("prompt", *(("dense",) if beside else ()), name), rows
