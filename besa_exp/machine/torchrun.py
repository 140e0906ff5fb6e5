"""Which of the processes that torchrun starts this one is, known before torch is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def is_launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_leader() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return not is_launched() or os.environ.get("RANK", "0") == "0"


def speaks_first() -> bool:
    """Whether this process is alone, or the first on its machine."""
    return not is_launched() or os.environ.get("LOCAL_RANK", "0") == "0"


def only_the_leader_speaks() -> None:
    """What the other processes print goes nowhere."""
    if not is_leader():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
