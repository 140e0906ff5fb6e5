"""What `pattern=` says. Nothing here imports torch, so that a request is checked before any long work."""

from __future__ import annotations

import re
from collections.abc import Mapping


def parse_pattern(pattern: str) -> tuple[int | None, int] | None:
    """None for "unstructured", (N, M) for "2:4" and the like, N kept of every M inputs, (None, M) for "N:8", literally
    with the letter: every row has an N of its own, which the method chooses. ValueError: none of these, or not
    0 < N < M."""
    if pattern == "unstructured":
        return None
    found = re.fullmatch(r"(N|\d+):(\d+)", pattern)
    if not found or not (int(found[2]) > 1 if found[1] == "N" else 0 < int(found[1]) < int(found[2])):
        raise ValueError(
            f"pattern={pattern}: must be 'unstructured' or 'N:M' with 0 < N < M (N weights kept of every M "
            "consecutive inputs); write for example pattern=2:4, or pattern=N:8 for an N that each row chooses"
        )
    return None if found[1] == "N" else int(found[1]), int(found[2])


def fixes_sparsity(pattern: str) -> bool:
    """Whether the pattern fixes the sparsity, as "2:4" does, so that `sparsity=` is not used."""
    return re.fullmatch(r"\d+:\d+", pattern) is not None


def indivisible(
    inputs: Mapping[str, int], pattern: str, remedy: str = "choose another pattern or pattern=unstructured"
) -> list[str]:
    """The problem where the inputs of linears, by name, are no multiple of the pattern's M."""
    group = (parse_pattern(pattern) or (None, 1))[1]
    odd = [f"{name} ({count})" for name, count in inputs.items() if count % group]
    more = f" and {len(odd) - 2} more" if len(odd) > 2 else ""
    told = f"the inputs of a linear must be divisible by {group}, not as those of {', '.join(odd[:2])}{more}; {remedy}"
    return [f"pattern={pattern}: {told}"] if odd else []


def check_unchosen(pattern: str, method: str) -> list[str]:
    """The problem where a method is asked to choose N for each row and cannot."""
    if not pattern.startswith("N:"):
        return []
    group = pattern.partition(":")[2]
    return [
        f"pattern={pattern}: {method} does not choose N for each row; use pruner=besa or besa_linear, or say N, as in "
        f"pattern={int(group) // 2}:{group}"
    ]
