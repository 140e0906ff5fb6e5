"""How much of the host's memory a run may still take: what the machine has free, or less where a container is limited.

A container sees the whole machine's memory, but the kernel ends it at its own limit, which its control groups hold.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def free_memory() -> int:
    """Bytes that this process can still take before the machine swaps or a limit ends it: of the processes that
    torchrun starts on a machine, each has an equal share."""
    left = limit_left(GROUPS, OWN)
    free = int(psutil.virtual_memory().available)
    return (free if left is None else min(free, left)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def give_back_memory() -> None:
    """Makes glibc return freed memory to the system, also in smaller pieces: without it a streamed model of 4 GB grew
    by 100 MB a block, and what a search holds of all blocks by a third. Other C libraries are left alone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def limit_left(groups: Path, own: Path) -> int | None:
    """Bytes left under the tightest memory limit of the control groups that `own` (/proc/self/cgroup) names below
    `groups`, of version 2 or 1, and of the groups above them; None: there is no limit.

    What the kernel keeps of files and can drop does not count as used."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = groups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        left += [_left(folder, *names) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return min((found for found in left if found is not None), default=None)


def _left(group: Path, limit: str, usage: str, droppable: str) -> int | None:
    """Of one group; None: it sets no limit, or cannot be read."""
    try:
        most = (group / limit).read_text(encoding="utf-8").strip()
        used = int((group / usage).read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return None
    return None if most == "max" else max(0, int(most) - used + int(stat.get(droppable, 0)))
