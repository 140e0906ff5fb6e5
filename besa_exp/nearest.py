"""The nearest valid name, for messages about a name that is not valid."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> str:
    """`; did you mean X?`, or nothing where no name is near. `prefix` is put before the name that is shown."""
    valid = sorted(set(names))
    folded = {name.lower().replace("-", "_"): name for name in valid}
    near = difflib.get_close_matches(word.lower().replace("-", "_"), folded, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{folded[near[0]]}?" if near else ""
