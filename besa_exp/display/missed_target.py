"""Whether a run reached its target sparsity, and whether its pruner can reach it at all.

A miss begins at half a point: rows of whole weights are off by less where they are not very short."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from besa_exp.settings import RunSettings

MISS = 0.005  # of all weights


def missed_by(target: float, measured: float) -> float:
    """measured - target where that is half a point or more, else 0."""
    return measured - target if abs(measured - target) >= MISS - 1e-9 else 0.0


def miss_of(results: Mapping[str, Any]) -> float:
    """`missed_by` of a results.json; 0 where nothing was to be pruned."""
    if results.get("target_sparsity") is None or results.get("pruner") == "dense":
        return 0.0
    return missed_by(results["target_sparsity"], results["measured_sparsity"])


def told_miss(results: Mapping[str, Any]) -> str:
    """`missed its target of 80 % by 18.8 points (too few zeros)`; empty where it did not."""
    miss = miss_of(results)
    if not miss:
        return ""
    target, side = 100 * results["target_sparsity"], "few" if miss < 0 else "many"
    return f"missed its target of {target:g} % by {abs(100 * miss):.1f} points (too {side} zeros)"


def out_of_reach(settings: RunSettings) -> str | None:
    """A sentence where the target is known to be missed before anything is loaded; None: it may be met."""
    least, most = settings.pruner.traits.reach
    nearest = min(max(settings.sparsity, least), most)
    if not missed_by(settings.sparsity, nearest):
        return None
    return (
        f"sparsity={settings.sparsity:g} will be missed: {settings.pruner_name} with these keys reaches "
        f"{100 * least:.1f} to {100 * most:.1f} % of zeros only, so the run will end near {100 * nearest:.1f} %; "
        "pruner=besa meets any target"
    )
