"""The rules that keys are held to, how the ones that break them are named, and that no number goes without one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass, replace
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from besa_exp.errors import ConfigurationError
from besa_exp.presets import CONF_DIR, METHOD_GROUPS, composed, presets
from besa_exp.recovery.descent import Adam
from besa_exp.recovery.mezo import Mezo
from besa_exp.recovery.objective import Distillation
from besa_exp.recovery.recipe import BY_ADAM
from besa_exp.recovery.spiel import Spiel
from besa_exp.rules import Count, Positive, Rule, Seed, Share, broken_rules, check_fields, one_of, ruled_hints, within
from besa_exp.settings import EvaluationSettings, RecoverySettings, RunSettings, TuneSettings


@dataclass(frozen=True)
class Inner:
    pass


@dataclass(frozen=True)
class Fields:
    lr: Annotated[float, within(above=0, below=1, note="a share of the row")] | None = 0.5
    steps: Count = 1
    name: Annotated[str, one_of("kl", "mse")] = "kl"
    batch_size: Count | Literal["auto"] = "auto"
    ratios: tuple[Share, ...] = (0.5,)
    published: dict[str, dict[int, Positive]] | None = None
    dense: bool = False
    inner: Inner | None = None


@pytest.mark.parametrize(
    ("rule", "inside", "outside", "said"),
    [
        (within(above=0, most=1), [1e-9, 1], [0, 1.001], "be above 0 and at most 1"),
        (within(least=0, below=1), [0, 0.999], [-1e-9, 1], "be in [0, 1)"),
        (within(least=2, most=8), [2, 8], [1, 9], "be in [2, 8]"),
        (within(least=0), [0, 10**9], [-1], "not be negative"),
        (within(above=0, note="of a row"), [1], [0], "be above 0, of a row"),
        (one_of("kl", "mse"), ["kl"], ["ce", ""], "be one of kl, mse"),
    ],
)
def test_values_are_held_to_their_limits(rule: Rule, inside: list[Any], outside: list[Any], said: str) -> None:
    assert rule.said == said
    assert all(rule.holds(value) for value in inside)
    assert not any(rule.holds(value) for value in outside)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lr": 1.0}, "group.lr=1: must be above 0 and below 1, a share of the row; write for example group.lr=0.5"),
        ({"lr": math.nan}, "group.lr=nan: must be a finite number; write for example group.lr=0.5"),
        ({"lr": -math.inf}, "group.lr=-inf: must be a finite number; write for example group.lr=0.5"),
        ({"lr": "x"}, "group.lr=x: must be a finite number; write for example group.lr=0.5"),
        ({"steps": 1.5}, "group.steps=1.5: must be a whole number; write for example group.steps=1"),
        ({"steps": True}, "group.steps=true: must be a whole number; write for example group.steps=1"),
        ({"steps": None}, "group.steps=null: must be a whole number; write for example group.steps=1"),
        ({"steps": 0}, "group.steps=0: must be at least 1; write for example group.steps=1"),
        ({"name": "ce"}, "group.name=ce: must be one of kl, mse; write for example group.name=kl"),
        (
            {"batch_size": "all"},
            "group.batch_size=all: must be a whole number, or be one of auto; write for example group.batch_size=auto",
        ),
        ({"ratios": (1, 2)}, "group.ratios=[1,2]: must be above 0 and at most 1; write for example group.ratios=[0.5]"),
        ({"dense": 1}, "group.dense=1: must be true or false; write for example group.dense=false"),
        ({"inner": 1}, "group.inner=1: must be Inner, or the name of a preset"),
        ({"published": 5}, "group.published=5: must be a table of keys and values"),
        ({"published": {"c4": {64: -1}}}, "group.published={'c4': {64: -1}}: must be above 0"),
    ],
)
def test_a_field_that_breaks_its_rule_is_named_with_the_rule_and_a_value_that_keeps_it(
    changes: dict[str, Any], problem: str
) -> None:
    assert broken_rules(replace(Fields(), **changes), "group") == [problem]


def test_all_fields_that_break_their_rules_are_named_together_and_others_are_let_through() -> None:
    with pytest.raises(ConfigurationError) as refused:
        check_fields(Fields(lr=2, steps=0), "")
    assert [problem.split(":")[0] for problem in refused.value.problems] == ["lr=2", "steps=0"]
    check_fields(Fields(lr=None, batch_size=3, ratios=(1, 0.1), published={"c4": {64: 5.5}}), "")


def test_what_is_no_object_of_a_preset_is_refused() -> None:
    (problem,) = broken_rules(None, "recovery")
    assert problem.startswith("recovery=null: must be the name of a preset")


def parts(hint: Any) -> Iterator[Any]:
    """What a type is made of, those with a rule whole."""
    if get_origin(hint) in (Annotated, Literal) or not get_args(hint):
        yield hint
        return
    for inner in get_args(hint)[get_origin(hint) is dict :]:
        yield from parts(inner)


def classes_in(value: Any) -> Iterator[type]:
    """The dataclasses that a preset, or a part of it, names, and those that their fields are made of."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield from with_fields(resolve_name(value["_target_"]))
        for inner in value.values():
            yield from classes_in(inner)


def with_fields(cls: type) -> Iterator[type]:
    yield cls
    for hint in ruled_hints(cls).values():
        for part in parts(hint):
            if is_dataclass(part):
                yield from with_fields(part)  # type: ignore[arg-type]


METHODS = {
    cls
    for group in METHOD_GROUPS
    for name in presets(group)
    for cls in classes_in(composed(CONF_DIR / group / f"{name}.yaml"))
} - {RecoverySettings}
METHODS |= {getattr(cls, "func", cls) for cls in BY_ADAM.values()} | {Adam, Mezo, Spiel, Distillation}
SETTINGS = {inner for cls in (RunSettings, EvaluationSettings, TuneSettings) for inner in with_fields(cls)}


@pytest.mark.parametrize("cls", sorted(METHODS | SETTINGS, key=str))
def test_every_number_that_a_person_may_set_has_a_rule(cls: type) -> None:
    without = [name for name, hint in ruled_hints(cls).items() if {int, float} & {*parts(hint)}]
    assert not without, f"{cls.__name__}: give {without} a type of besa_exp/rules.py, as Count or Share"


@pytest.mark.parametrize("cls", sorted(METHODS, key=str))
def test_every_method_holds_itself_to_its_rules(cls: type) -> None:
    needed = {"ratio": 0.5, "lr": 0.5, "steps": 9}
    for name, hint in ruled_hints(cls).items():
        ruled = [part for part in parts(hint) if get_origin(part) is Annotated]
        for wrong in (math.nan, True, *([0.5] if ruled and get_args(ruled[0])[0] is int else [])) if ruled else ():
            given = {key: value for key, value in needed.items() if key in ruled_hints(cls)} | {name: wrong}
            given[name] = (wrong,) if get_origin(hint) is tuple else wrong
            with pytest.raises(ConfigurationError, match=rf"\.{name}=\[?(nan|true|0\.5)\]?: must be a"):
                cls(**given)


def test_seeds_are_those_that_every_library_takes() -> None:
    rule = get_args(Seed)[1]
    assert [rule.holds(seed) for seed in (-1, 0, 2**32 - 1, 2**32)] == [False, True, True, False]
