"""The rules that keys are held to, and how the ones that break them are named."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from besa_exp.errors import ConfigurationError, Rule, check_fields, one_of, within


@dataclass(frozen=True)
class Fields:
    lr: float | None = 0.5
    steps: int = 1
    name: str = "kl"


@pytest.mark.parametrize(
    ("rule", "inside", "outside", "said"),
    [
        (within(above=0, most=1), [1e-9, 1], [0, 1.001, math.nan, math.inf, None], "above 0 and at most 1"),
        (within(least=0, below=1), [0, 0.999], [-1e-9, 1, math.nan], "at least 0 and below 1"),
        (within(least=0), [0, 10**9], [-1, math.inf], "not be negative"),
        (within(above=0, or_null=True, note="try 1e-4"), [None, 1], [0], "above 0, or null; try 1e-4"),
    ],
)
def test_numbers_are_held_to_their_limits(
    rule: Rule, inside: list[float], outside: list[float | None], said: str
) -> None:
    assert said in rule.said
    assert all(rule.holds(value) for value in inside)
    assert not any(rule.holds(value) for value in outside)


def test_each_field_that_breaks_a_rule_is_named() -> None:
    with pytest.raises(ConfigurationError) as refused:
        check_fields(Fields(lr=2, steps=0), "recovery", within(least=1, below=2), "lr", "steps")
    assert refused.value.problems == (
        "recovery.lr=2: must be at least 1 and below 2",
        "recovery.steps=0: must be at least 1 and below 2",
    )
    check_fields(Fields(), "recovery", one_of("kl", "mse"), "name")
    with pytest.raises(ConfigurationError, match=r"recovery\.name=ce: must be one of kl, mse"):
        check_fields(Fields(name="ce"), "recovery", one_of("kl", "mse"), "name")
