"""What an importance, an update, a budget or a structure method wrongly gives is told in a sentence that names it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pruner_cases import DENSE, INPUT_IDS, prune_tiny

from besa_exp.blocks.block import capture_blocks
from besa_exp.blocks.observation import Observed
from besa_exp.blocks.pruner import Traits, pruned_by_masks
from besa_exp.checkpoints.structure import Dimensions, Structure
from besa_exp.errors import RunError
from besa_exp.methods.budgets.budget import exact_goals
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.methods.structure.method import check_chosen
from besa_exp.methods.structure.shortgpt import ShortGPT
from besa_exp.methods.updates.updated import Updated
from besa_exp.tensors.masks import Goal

BLOCK = capture_blocks(DENSE, INPUT_IDS)[0]
OF_TENSORS: Any = tuple(torch.arange(4))


@dataclass(frozen=True)
class Given:
    """An importance that gives `scores` for whatever weights."""

    scores: Any
    statistic = None
    gradients = False

    def __call__(self, weight: torch.Tensor, statistic: Any, squared_gradient: Any) -> Any:
        return self.scores(weight)


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        (lambda weight: None, r"up_proj: the importance Given: a score for each weight must be .* \[.*, not NoneType"),
        (lambda weight: weight.abs().mean(dim=0), r"the importance Given: .* floating point .*float32 \[64\]"),
        (lambda weight: weight.long(), r"must be floating point .*, not torch\.int64"),
        (lambda weight: weight.sqrt(), r"up_proj: the importance Given gave NaN, which has no rank"),
    ],
)
def test_an_importance_gives_a_number_for_each_weight(scores: Any, told: str) -> None:
    """NaN would be kept, and the target missed; whole numbers tie."""
    with pytest.raises(RunError, match=told):
        Observed(Given(scores), {}, {}).score(BLOCK, "mlp.up_proj")
    with pytest.raises(RunError, match=r"layers\.0\..*: the importance Given"):
        prune_tiny.__wrapped__(Uniform(Given(scores)))


def test_an_importance_may_be_infinite_where_weights_are_to_stay() -> None:
    def of_first_column(weight: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(weight.shape[1]) == 0, torch.inf, weight.abs())

    for _, pruned in prune_tiny.__wrapped__(Uniform(Given(of_first_column)))[1]:
        assert all(mask[:, 0].all() and mask.sum() == mask.numel() // 2 for mask in pruned.keep_masks.values())


class Sums:
    """A statistic without the norms that pruners ask for."""

    def __init__(self, columns: int, device: torch.device) -> None: ...
    def add(self, inputs: torch.Tensor) -> None: ...
    def sum_over_ranks(self, samples: int) -> None: ...
    def is_finite(self) -> bool:
        return True


@dataclass(frozen=True)
class Idle:
    """An update that observes sums, and gives what `gives` makes of the pruner's decision."""

    gives: Any = None
    traits = Traits(Sums)

    def check(self, pattern: str) -> list[str]:
        return []

    def update_block(self, task: Any, pruned: Any) -> Any:
        return self.gives(pruned)


@pytest.mark.parametrize(
    ("gives", "told"),
    [
        (lambda pruned: None, r"layers\.0: update=idle gave NoneType, not a PrunedBlock"),
        (
            lambda pruned: pruned_by_masks({name: mask | True for name, mask in pruned.keep_masks.items()}),
            r"layers\.0: update=idle keeps (\d+) weights where the pruner kept \d+; it exchanges them at most",
        ),
    ],
)
def test_an_update_gives_a_decision_of_as_many_weights(gives: Any, told: str) -> None:
    with pytest.raises(RunError, match=told):
        prune_tiny.__wrapped__(Updated(Uniform("magnitude"), Idle(gives)))


def test_an_update_whose_statistic_lacks_the_norms_is_refused_beside_a_pruner_that_needs_them() -> None:
    (problem,) = Updated(Uniform("wanda"), Idle()).check(0.5, "unstructured")
    told = "update=idle: cannot follow pruner uniform, which needs the InputNorm of the inputs and not what the update"
    assert problem == f"{told} observes; give Sums a squared_norm as InputNorm has it, or take pruner=magnitude"
    assert Updated(Uniform("magnitude"), Idle()).check(0.5, "unstructured") == []


@pytest.mark.parametrize(
    ("sparsities", "told"),
    [
        ([0.5, 0.5], "the budget gives a tensor of 2 sparsities, one a block, not list"),
        (torch.tensor([0.5]), r"one a block, not one of the shape \[1\]"),
        (torch.tensor([[0.5], [0.5]]), r"one a block, not one of the shape \[2, 1\]"),
        (torch.tensor([40.0, 60.0]), r"one a block, in \[0, 1\] and 0\.5 in the mean or near it, not 50"),
    ],
)
def test_a_budget_gives_a_fraction_for_each_block(sparsities: Any, told: str) -> None:
    with pytest.raises(RunError, match=told):
        exact_goals(sparsities, [8, 8], 0.5)
    assert exact_goals(torch.tensor([-0.25, 1.25]), [8, 8], 0.5) == [Goal(0.0, exact=True), Goal(1.0, exact=True)]


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (None, r"structure=ShortGPT: choose gave NoneType, not a Structure"),
        (Structure((0, 1), channels=2 * (OF_TENSORS,)), r"gave the number tensor\(0\); numbers are Python's"),
        (
            Structure((0, 1), channels=((0, 1),)),
            r"choose gave no part of this model: lists the channels of 1 blocks and keeps 2 blocks",
        ),
    ],
)
def test_a_structure_is_whole_numbers_of_the_models_own_parts(chosen: Any, told: str) -> None:
    dimensions = Dimensions(2, 8, 2, 4, 2, 16)
    with pytest.raises(RunError, match=told):
        check_chosen(ShortGPT(1), chosen, dimensions)
    check_chosen(ShortGPT(1), replace(Structure((1,)), channels=((0, 3),)), dimensions)


def test_what_a_search_keeps_are_plain_values(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"a search keeps plain values \(Object of type Tensor is not JSON"):
        Progress(tmp_path / "search.json").write({"seen": torch.tensor(1.0)})
