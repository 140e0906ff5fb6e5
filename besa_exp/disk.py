"""Whether a run's files will fit on the disk; asked before anything is loaded, so nothing heavy is imported here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from besa_exp.settings import SaveSettings

SPARE_BYTES = 64 * 2**20  # logs, metrics, W&B's files


def required_bytes(model_bytes: int, pruned_weights: int, save: SaveSettings) -> int:
    """Disk a run needs: the weights as they will be saved, one bit a weight of the linears, and some to spare."""
    return SPARE_BYTES + (model_bytes if save.model else 0) + (-(-pruned_weights // 8) if save.masks else 0)


def check_disk(
    folder: Path,
    needed: int,
    key: str = "hydra.run.dir",
    less: str = ", or set save.model=false (masks alone take one bit a weight)",
) -> list[str]:
    """The problem, if any, of writing `needed` bytes in `folder`, which need not exist yet. `key` names it; `less` says
    how to need less."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        return [f"{key}={folder}: {place} cannot be written to; name another folder with {key}="]
    free = shutil.disk_usage(place).free
    if free >= needed:
        return []
    return [
        f"{key}={folder}: about {_size(needed)} are to be written but {_size(free)} are free on that disk; "
        f"free some, choose another disk{less}"
    ]


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
