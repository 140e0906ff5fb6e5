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


def did_you_mean_one_of(word: str, names: Iterable[str], most: int = 3) -> str:
    """As `did_you_mean`, with up to `most` names; those that go on where `word` ends come first, in the order given."""
    valid = list(dict.fromkeys(names))
    longer = [name for name in valid if name.startswith(f"{word}_")]
    near = difflib.get_close_matches(word, valid, n=most, cutoff=0.5)
    found = list(dict.fromkeys([*longer[: most - 1], *near, *longer]))[:most]
    return f"; did you mean {' or '.join(found)}?" if found else ""
