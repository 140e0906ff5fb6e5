"""Where the runs are: run folders below the places a reader names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path

from besa_exp.errors import ConfigurationError
from besa_exp.run_folder.status import read_status


def find_runs(places: Sequence[str]) -> list[Path]:
    """Every run folder at or below `places` (folders, files in run folders, patterns), each once, in order.

    ConfigurationError: a place that is not there, or no run at all; every problem is named."""
    problems: list[str] = []
    found: dict[Path, Path] = {}  # where it really is: as it was named
    for place in places:
        named = Path(place)
        matching = [] if named.exists() else sorted(glob(place, recursive=True))  # noqa: PTH207 - from any place
        roots = [named] if named.exists() else [Path(path) for path in matching]
        if not roots:
            problems.append(f"{place}: no such folder, and no folder matches it; name run folders or sweeps")
            continue
        runs = [run for root in roots for run in _below(root if root.is_dir() else root.parent)]
        if not runs:
            problems.append(f"{place}: no run in it (a run folder holds status.json or results.json)")
        for run in runs:
            found.setdefault(run.resolve(), run)
    if problems:
        raise ConfigurationError(*problems)
    return list(found.values())


def _below(root: Path) -> Iterator[Path]:
    """Run folders; what lies inside one is its own. Hidden folders and links to folders are left out."""
    for folder, names, files in os.walk(root):
        path = Path(folder)
        if "results.json" in files or ("status.json" in files and read_status(path)):
            names.clear()
            yield path
        else:
            names[:] = sorted(name for name in names if not name.startswith("."))
