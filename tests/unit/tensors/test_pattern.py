"""The pattern as the request is checked by it, and as the block loop reads it."""

from __future__ import annotations

import pytest

from besa_exp.tensors.masks import Goal
from besa_exp.tensors.pattern import fixes_sparsity, parse_pattern

PATTERNS = {  # (N, M), the target, and whether the sparsity follows from it
    "unstructured": (None, Goal(0.3), False),
    "2:4": ((2, 4), Goal(0.5, (2, 4)), True),
    "1:32": ((1, 32), Goal(1 - 1 / 32, (1, 32)), True),
    "N:8": ((None, 8), Goal(0.3, group=8), False),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_check_reads_a_pattern_as_the_run_does(pattern: str) -> None:
    assert (parse_pattern(pattern), Goal.parse(0.3, pattern), fixes_sparsity(pattern)) == PATTERNS[pattern]


@pytest.mark.parametrize("pattern", ["N:1", "N:N", "n:8", "*:8", "4:4", "0:4", "2:x", "2:4 ", "structured", ""])
def test_what_is_no_pattern_is_refused_by_both_in_the_same_words(pattern: str) -> None:
    with pytest.raises(ValueError, match="must be 'unstructured' or 'N:M'") as checked:
        parse_pattern(pattern)
    with pytest.raises(ValueError, match="must be 'unstructured' or 'N:M'") as run:
        Goal.parse(0.5, pattern)
    assert str(checked.value) == str(run.value)
