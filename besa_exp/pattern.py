"""What `pattern=` says. Nothing here imports torch, so that a request is checked before any long work."""

from __future__ import annotations

import re


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """None for "unstructured", (N, M) for "N:M", N kept of every M inputs. ValueError: neither, or not 0 < N < M."""
    if pattern == "unstructured":
        return None
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(
            f"pattern={pattern}: must be 'unstructured' or 'N:M' with 0 < N < M (N weights kept of every M "
            "consecutive inputs); write for example pattern=2:4"
        )
    return int(found[1]), int(found[2])
