"""Which of the processes that torchrun starts this one is, known before torch is imported."""

from __future__ import annotations

import os


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_leader() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return not is_launched() or os.environ.get("RANK", "0") == "0"
