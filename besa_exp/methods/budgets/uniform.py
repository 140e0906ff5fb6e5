"""The uniform budget: every block gives up the same. It is what a run does without a budget, by a name for sweeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Uniform:
    """Nothing to measure: each block's target is the model's."""

    def check(self, sparsity: float, pattern: str) -> list[str]:
        """Any target, any N:M."""
        return []
