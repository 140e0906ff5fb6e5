"""The pattern as the request is checked by it, and as the block loop reads it."""

from __future__ import annotations

import pytest

from besa_exp.masks import Target
from besa_exp.pattern import parse_pattern


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:32"])
def test_the_check_reads_a_pattern_as_the_run_does(pattern: str) -> None:
    assert parse_pattern(pattern) == Target.parse(0.5, pattern).pattern


@pytest.mark.parametrize("pattern", ["4:4", "0:4", "2:x", "2:4 ", "structured", ""])
def test_what_is_no_pattern_is_refused_by_both_in_the_same_words(pattern: str) -> None:
    with pytest.raises(ValueError, match="must be 'unstructured' or 'N:M'") as checked:
        parse_pattern(pattern)
    with pytest.raises(ValueError, match="must be 'unstructured' or 'N:M'") as run:
        Target.parse(0.5, pattern)
    assert str(checked.value) == str(run.value)
