"""What a model costs, as rows of a table: results.json's `cost`, beside the dense model's where that is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COST_HEADS = ("cost", "dense", "model")


def cost_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Cells under COST_HEADS; [] where no time was measured and nothing is gone whole: zeros cost what weights do.
    Times are of one machine, which the first line names."""
    cost = results.get("cost") or {}
    if "device" not in cost and "dense" not in cost:
        return []
    own, dense = _cells(cost), _cells((results.get("dense") or {}).get("cost") or cost.get("dense") or {})
    return [(what, dense.get(what, ""), value) for what, value in own.items()]


def _cells(cost: Mapping[str, Any]) -> dict[str, str]:
    if not cost:
        return {}
    cells = {"device": f"{cost['device']}, {cost['dtype']}, {cost['threads']} threads"} if "device" in cost else {}
    cells |= {
        "parameters": f"{cost['parameters']:,}",
        "MB": f"{cost['bytes'] / 1e6:,.2f}",
        "MFLOPs a token": f"{cost['flops_per_token'] / 1e6:,.2f}",
        "cache bytes a token": f"{cost['cache_bytes_per_token']:,.0f}",
    }
    for kind in ("prefill", "decode"):
        for batch, speed in cost.get(f"{kind}_tokens_per_second", {}).items():
            cells[f"{kind} tokens/s, batch {batch}"] = f"{speed:,.0f}"
    return cells
