"""Where a run's time goes, function by function."""

from __future__ import annotations

import cProfile
import io
import pstats
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LINES = 40


@contextmanager
def profiling(folder: Path) -> Iterator[None]:
    """Writes profile.txt (the functions with most time of their own, then those with most time in all) and
    profile.pstats (for viewers) into `folder`, whether the block ends well or not."""
    profile = cProfile.Profile()
    try:
        with profile:
            yield
    finally:
        text = io.StringIO()
        stats = pstats.Stats(profile, stream=text)
        for order in ("tottime", "cumulative"):
            stats.sort_stats(order).print_stats(LINES)
        (folder / "profile.txt").write_text(text.getvalue(), encoding="utf-8")
        stats.dump_stats(folder / "profile.pstats")
