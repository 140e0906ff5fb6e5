"""Whether a run's files will fit on the disk; asked before anything is loaded, so nothing heavy is imported here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from besa_exp.settings import SaveSettings

ONE_FILE = 5 * 10**9  # bytes: a model of more is saved in several files, which are links to the finished blocks
SPARE_BYTES = 64 * 2**20  # logs, metrics, W&B's files


def required_bytes(model_bytes: int, pruned_weights: int, weights: int, save: SaveSettings, whole: bool) -> int:
    """Disk a run needs at least. Until it is done the finished blocks lie in its folder, with a bit a weight of the
    linears; then the model, whose shards are links to them unless it was loaded `whole` and makes ONE_FILE; masks; and
    some to spare. `weights`: of the model, `pruned_weights` of them in the blocks' linears."""
    bits = -(-pruned_weights // 8)
    blocks = model_bytes * pruned_weights // max(1, weights)
    saved = model_bytes - (0 if whole and model_bytes <= ONE_FILE else blocks) if save.model else 0
    return SPARE_BYTES + blocks + bits + saved + (bits if save.masks else 0)


def check_disk(
    folder: Path,
    needed: int,
    key: str = "hydra.run.dir",
    less: str = ", or set save.model=false (masks alone take one bit a weight)",
) -> list[str]:
    """The problem, if any, of writing `needed` bytes in `folder`, which need not exist yet. `key` names it; `less` says
    how to need less."""
    place = existing(folder)
    if not place.is_dir() or not os.access(place, os.W_OK):
        return [f"{key}={folder}: {place} cannot be written to; name another folder with {key}="]
    free = shutil.disk_usage(place).free
    if free >= needed:
        return []
    return [
        f"{key}={folder}: about {size_in_words(needed)} are to be written but {size_in_words(free)} are free on that "
        f"disk; free some, choose another disk{less}"
    ]


def existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    place = folder.absolute()
    return next(found for found in (place, *place.parents) if found.exists())


def size_in_words(number: int) -> str:
    """`1.2 GB`, `34.5 MB`, `6 kB`, `7 B`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.{1 if unit != 'kB' else 0}f} {unit}"
    return f"{number} B"
