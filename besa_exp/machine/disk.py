"""Whether a run's files will fit on the disk; asked before anything is loaded, so nothing heavy is imported here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from besa_exp.settings import SaveSettings

SPARE_BYTES = 64 * 2**20  # logs, metrics, W&B's files


def required_bytes(model_bytes: int, pruned_weights: int, weights: int, save: SaveSettings, whole: bool) -> int:
    """Disk a run needs at least. Until it is done the finished blocks lie in its folder, with a bit a weight of the
    linears; then the model, whose shards are links to them unless it was loaded `whole`; masks; and some to spare.
    `weights`: of the model, `pruned_weights` of them in the blocks' linears."""
    bits = -(-pruned_weights // 8)
    blocks = model_bytes * pruned_weights // max(1, weights)
    saved = model_bytes - (0 if whole else blocks) if save.model else 0
    return SPARE_BYTES + blocks + bits + saved + (bits if save.masks else 0)


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
