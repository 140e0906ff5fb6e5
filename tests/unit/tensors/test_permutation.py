"""Channel permutation for N:M against a literal search, and what the pruner and its masks file make of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruner_cases import prune_tiny
from safetensors.torch import load_file

from besa_exp.checkpoints.files import load_masks, masks_description, merge_masks, save_masks
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.methods.updates.dsnot import Dsnot
from besa_exp.methods.updates.updated import Updated
from besa_exp.tensors.masks import keep_n_of_m
from besa_exp.tensors.permutation import _exchanged, keep_n_of_m_permuted, kept_importance, permuted_for

PATTERNS = [(2, 4), (1, 4), (4, 8), (3, 5)]


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    by_column = torch.rand(columns, generator=generator).exp() ** 2
    return torch.rand(rows, columns, generator=generator) * by_column


def literal(importance: torch.Tensor, order: list[int], kept: int, group: int) -> float:
    total = 0.0
    for row in importance.double().tolist():
        for start in range(0, len(order), group):
            total += sum(sorted(row[column] for column in order[start : start + group])[-kept:])
    return total


@pytest.mark.parametrize(("kept", "group"), PATTERNS)
@pytest.mark.parametrize("place", [0, 1])
def test_an_exchange_is_the_best_there_is(kept: int, group: int, place: int) -> None:
    importance, order = drawn(7, 4 * group), torch.randperm(4 * group, generator=torch.Generator().manual_seed(2))
    groups = order.view(4, group)
    best = 0.0
    for dealt in itertools.permutations(groups[:, place].tolist()):
        tried = groups.clone()
        tried[:, place] = torch.tensor(dealt)
        best = max(best, literal(importance, tried.flatten().tolist(), kept, group))
    found = _exchanged(importance, order, place, kept, group).tolist()
    assert literal(importance, found, kept, group) == pytest.approx(best, rel=1e-6)
    assert best > literal(importance, order.tolist(), kept, group)  # there was something to find


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 6),
    pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 99),
)
def test_a_permutation_is_one_and_keeps_no_less(rows: int, groups: int, pattern: tuple[int, int], seed: int) -> None:
    kept, group = pattern
    importance = drawn(rows, groups * group, seed)
    order = permuted_for(importance, kept, group)
    assert sorted(order.tolist()) == list(range(groups * group))
    own = keep_n_of_m(importance, kept, group)
    permuted = keep_n_of_m_permuted(importance, order, kept, group)
    assert importance[permuted].double().sum() >= importance[own].double().sum() * (1 - 1e-9)
    assert permuted[:, order].view(-1, group).sum(dim=1).eq(kept).all()
    assert float(importance[permuted].double().sum()) == pytest.approx(kept_importance(importance, order, kept, group))


def test_important_inputs_that_stand_side_by_side_are_parted() -> None:
    importance = torch.full((3, 16), 0.01)
    importance[:, :8] = 1.0
    order = permuted_for(importance, 2, 4)
    assert keep_n_of_m_permuted(importance, order, 2, 4)[:, :8].all()
    assert keep_n_of_m(importance, 2, 4)[:, :8].sum() == 12  # half of them, in their own order


@pytest.mark.parametrize(
    "pruner", [Uniform("ria", permute=True), Updated(Uniform("ria", permute=True), Dsnot(threshold=0.0))]
)
def test_masks_are_n_of_m_in_the_order_told_and_linears_of_one_input_share_it(pruner) -> None:
    _, results = prune_tiny(pruner, pattern="2:4")
    moved = 0
    for _, pruned in results:
        for name, mask in pruned.keep_masks.items():
            order = pruned.permutations[name]
            assert mask[:, order].view(-1, 4).sum(dim=1).eq(2).all(), name
            moved += int(mask.view(-1, 4).sum(dim=1).ne(2).any())
        orders = {name.rpartition(".")[2]: order for name, order in pruned.permutations.items()}
        for shared in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            assert len({tuple(orders[name].tolist()) for name in shared}) == 1
    assert moved  # not the groups that stand side by side


def test_the_masks_file_holds_the_orders_and_they_are_merged(tmp_path: Path) -> None:
    order = torch.tensor([2, 0, 3, 1])
    mask = torch.tensor([[True, False, True, False]])
    save_masks({"b.weight": ~mask}, tmp_path / "0", "0")  # one byte, after which no whole number of four may lie
    save_masks({"a.weight": mask}, tmp_path / "1", "1", permutations={"a.weight": order})
    merge_masks([tmp_path / "0", tmp_path / "1"], tmp_path / "all", {"method": "ria"})
    assert masks_description(tmp_path / "all")["method"] == "ria"
    assert load_file(tmp_path / "all")["a.weight.permutation"].tolist() == order.tolist()
    assert "b.weight.permutation" not in load_file(tmp_path / "all")
    assert {name: mask.tolist() for name, mask in load_masks(tmp_path / "all").items()} == {
        "a.weight": mask.tolist(),
        "b.weight": (~mask).tolist(),
    }


@pytest.mark.parametrize("pattern", ["unstructured", "N:8"])
def test_without_groups_there_is_nothing_to_permute(pattern: str) -> None:
    (problem,) = Uniform("ria", permute=True).check(0.5, pattern)
    assert "pruner.permute" in problem
    assert "2:4" in problem
