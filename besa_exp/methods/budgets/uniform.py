"""The uniform budget: every block gives up the same. It is what a run does without a budget, by a name for sweeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SameForAll:
    """Nothing to measure: each block's goal is the model's, under any pattern."""
