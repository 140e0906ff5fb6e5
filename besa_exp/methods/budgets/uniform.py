"""The uniform budget: every block gives up the same. It is what a run does without a budget, by a name for sweeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SameForAll:
    """Nothing to measure: each block's goal is the model's."""

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Any goal, any N:M."""
        return []
