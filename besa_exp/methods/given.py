"""Whether what a preset or a person gives for a method is one, and takes the target; asked before any long work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from besa_exp.blocks.pruner import Pruner, Traits
from besa_exp.methods.budgets.budget import Budget
from besa_exp.methods.budgets.trial import DepthSearch, check_budget
from besa_exp.methods.budgets.uniform import SameForAll
from besa_exp.methods.structure.method import StructureMethod
from besa_exp.methods.updates.updated import Update, with_update
from besa_exp.tensors.statistics import Statistic

KINDS: Mapping[str, tuple[type, ...]] = {
    "pruner": (Pruner,),
    "update": (Update,),
    "budget": (Budget, DepthSearch, SameForAll),
    "structure": (StructureMethod,),
}


def check_kinds(methods: Mapping[str, Any]) -> list[str]:
    """The problem of each method, by its group, that lacks a member of its kind, in complete sentences."""
    return [_unlike(group, methods[group]) for group, kinds in KINDS.items() if not _is_one(methods[group], kinds)]


def check_methods(methods: Mapping[str, Any], sparsity: float, pattern: str) -> list[str]:
    """The problems of methods of their kinds with this target, in complete sentences."""
    pruner, update, budget = (methods[group] for group in ("pruner", "update", "budget"))
    answers = {"pruner": pruner.check(sparsity, pattern), "update": update.check(pattern) if update else []}
    problems = [
        f"{group}={type(methods[group]).__name__}: its check gives {answer!r}; it gives a list of sentences, [] where "
        "nothing is wrong"
        for group, answer in answers.items()
        if not isinstance(answer, list) or not all(isinstance(sentence, str) for sentence in answer)
    ]
    problems += [problem for group in answers if methods[group] for problem in _odd_members(group, methods[group])]
    return problems or [*with_update(pruner, update).check(sparsity, pattern), *check_budget(budget, pattern)]


def _odd_members(group: str, method: Any) -> list[str]:
    """What would show too late to be told: the block loop asks the traits, and a run that goes on begins at any
    block."""
    parameters = getattr(method, "__dataclass_params__", None)
    if parameters is not None and not parameters.frozen:
        return [
            f"{group}={type(method).__name__}: is a dataclass that can change; write @dataclass(frozen=True): what it "
            "keeps from block to block is lost where a run goes on"
        ]
    traits, of = method.traits, f"{group}={type(method).__name__}: its traits"
    if not isinstance(traits, Traits):
        return [f"{of} are {traits!r}; give traits = Traits(...) of besa_exp.blocks.pruner"]
    observed = [one for one in (traits.statistic, traits.under_pattern) if one is not None]
    return [
        f"{of} ask for {one!r}; a statistic is a class, such as besa_exp.tensors.statistics.InputNorm"
        for one in observed
        if not (isinstance(one, type) and issubclass(one, Statistic))
    ]


def _is_one(method: Any, kinds: tuple[type, ...]) -> bool:
    """A run may do without any method but the pruner. A class has the members of its objects."""
    return (isinstance(method, kinds) and not isinstance(method, type)) or (method is None and Pruner not in kinds)


def _unlike(group: str, method: Any) -> str:
    members = [", ".join(sorted(name for name in vars(kind) if not name.startswith("_"))) for kind in KINDS[group]]
    article, names = "an" if group == "update" else "a", " or ".join(filter(None, members))
    if isinstance(method, type):
        return (
            f"{group}={method.__name__}: is a class; give an object of it, as besa_exp.preset({group!r}, NAME) makes it"
        )
    return f"{group}={type(method).__name__}: {article} {group} has {names}; see docs/extending.md"
