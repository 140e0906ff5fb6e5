"""What a method wrongly gives for a block is told in a sentence, before a weight is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from families import tiny
from tiny_llama import INPUT_IDS, tiny_llama

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.contract import check_decided
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.pruner import PrunedBlock, Task, Traits, pruned_by_masks
from besa_exp.blocks.reports import Step
from besa_exp.errors import RunError
from besa_exp.methods.pruners.dense import Dense
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.methods.updates.updated import with_update
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.statistics import InputMoments

MODEL = tiny_llama(context=32).requires_grad_(False)
BLOCK = capture_blocks(MODEL, INPUT_IDS)[0]
HALF, UP = Goal(0.5), "mlp.up_proj"
MASKS = {name: (torch.arange(linear.weight.numel()) % 4 > 1).view_as(linear.weight) for name, linear in
         BLOCK.linears.items()}  # fmt: skip
SOUND = pruned_by_masks(MASKS)
NORM = BLOCK.module.get_parameter("input_layernorm.weight")


def with_(part: str, **values: Any) -> PrunedBlock:
    """A sound decision but for one linear's, or with other values: past the types, which users have not checked."""
    odd, given = copy(SOUND), getattr(SOUND, part)
    object.__setattr__(odd, part, {**(given or {}), UP: values["up"]} if "up" in values else values["all"])
    return odd


def step(**values: float) -> Step:
    return replace(Step(0, 0, 1.0, 1.0, 0.0, 0.5), **values)


ODD: Mapping[str, object] = {
    r"layers\.0: the method gave NoneType, not a PrunedBlock": None,
    r"layers\.0: the method's keep_masks are not .*mlp\.down_proj": with_("keep_masks", all={UP: MASKS[UP]}),
    r"the method's weights are not .*: mlp\.up$": with_("weights", all={**MASKS, "mlp.up": MASKS[UP]}),
    r"layers\.0\.mlp\.up_proj: the method's keep_masks must be torch\.bool \[": with_("keep_masks", up=MASKS[UP][:1]),
    r"mlp\.up_proj: .* not torch\.float32": with_("keep_masks", up=MASKS[UP].float()),
    r"mlp\.up_proj: .* must be torch\.bool .*, not list": with_("keep_masks", up=MASKS[UP].tolist()),
    r"allocated must be floating point \[\d+\], not torch\.float32 \[\]": with_("allocated", up=torch.tensor(0.5)),
    r"allocated must be floating point .* not torch\.bool": with_("allocated", up=SOUND.allocated[UP] > 0),
    r"allocated are from 50 to 50; .* in \[0, 1\]": with_("allocated", up=100 * SOUND.allocated[UP]),
    r"allocated are from nan to nan": with_("allocated", up=torch.nan * SOUND.allocated[UP]),
    r"weights must be floating point .* not torch\.int64": with_(
        "weights", all={name: mask.long() for name, mask in MASKS.items()}
    ),
    r"the method's norms hold mlp\.up_proj\.weight, which is no norm or bias of the block; it has input_l": with_(
        "norms", all={"mlp.up_proj.weight": BLOCK.linears[UP].weight}
    ),
    r"the method's norms hold nowhere": with_("norms", all={"nowhere": NORM}),
    r"input_layernorm\.weight: the method's norms must be .* not torch\.float32 \[\]": with_(
        "norms", all={"input_layernorm.weight": torch.tensor(1.0)}
    ),
    r"loss_before is nan; it is a finite float": with_("loss_before", all=torch.nan),
    r"loss_before is tensor\(3\.\); it is": with_("loss_before", all=torch.tensor(3.0)),
    r"steps hold dict; give a tuple": with_("steps", all=({"loss": 1.0},)),
    r"step 1 of the method is not finite": with_("steps", all=(step(), step(loss=torch.nan))),
}


@pytest.mark.parametrize("told", ODD)
def test_what_a_method_gives_is_checked_before_a_weight_is_written(told: str) -> None:
    with pytest.raises(RunError, match=told):
        check_decided(BLOCK, ODD[told], HALF)


def test_masks_that_break_the_pattern_are_refused() -> None:
    """The zeros are as many as 2:4 has, and results and model card would say 2:4."""
    two, chosen = Goal.parse(0.5, "2:4"), Goal.parse(0.5, "N:8")
    check_decided(BLOCK, SOUND, two)
    check_decided(BLOCK, SOUND, chosen)
    check_decided(
        BLOCK, with_("keep_masks", up=MASKS[UP] & (torch.arange(MASKS[UP].shape[1]) > 9)), two
    )  # rounded to 0
    with pytest.raises(
        RunError, match=r"_proj: the method's keep_masks keep 2 of 2 .* row 0 where the pattern is 1:2; keep"
    ):
        check_decided(BLOCK, SOUND, Goal.parse(0.5, "1:2"))
    columns = MASKS[UP].shape[1]
    uneven = MASKS[UP].clone()
    uneven[3] = torch.arange(columns) % 16 > 7
    check_decided(BLOCK, with_("keep_masks", up=uneven), HALF)
    with pytest.raises(RunError, match=r"up_proj: .* keep 8 of 8 .* of row 3 where 4 of 8 are allocated to it"):
        check_decided(BLOCK, with_("keep_masks", up=uneven), chosen)
    apart = torch.cat([torch.arange(first, columns, 2) for first in (0, 1)])
    shuffled = (torch.arange(columns) % 8 > 3).repeat(len(uneven), 1)
    with pytest.raises(RunError, match=r"up_proj: the method's keep_masks keep 4 of 4"):
        check_decided(BLOCK, with_("keep_masks", up=shuffled), two)
    order = torch.arange(columns).view(-1, 2, 4).transpose(1, 2).flatten()  # 0 4 1 5 2 6 3 7
    back = replace(with_("keep_masks", up=shuffled), permutations={UP: order})
    check_decided(BLOCK, back, two)
    for odd in (apart.clamp(min=1), order[:-1]):
        with pytest.raises(
            RunError, match=rf"up_proj: the method's permutations must hold each of the {columns} inputs once"
        ):
            check_decided(BLOCK, replace(back, permutations={UP: odd}), two)


def test_a_linear_that_stays_whole_is_of_no_pattern() -> None:
    blocks = capture_blocks(MODEL, INPUT_IDS)
    inputs = embed(MODEL, blocks, INPUT_IDS, 5)
    assert [report.sparsity for report, _ in prune_blocks(blocks, inputs, Dense(), Goal.parse(0.5, "2:4"), 5)] == [0, 0]


@dataclass(frozen=True)
class Doubling:
    """It changes what it is given."""

    change: Callable[[Task], object]
    traits = Traits()

    def check(self, sparsity: float, pattern: str) -> list[str]:
        return []

    def prune_block(self, task: Task) -> PrunedBlock:
        self.change(task)
        return Uniform("magnitude").prune_block(task)


def test_a_method_that_changes_the_block_itself_is_stopped() -> None:
    """Its masks would be of other weights than the dense ones, which are what is written."""
    for change, told in {
        lambda task: task.weights[UP].mul_(2): r"layers\.0: the method changed mlp\.up_proj\.weight in place",
        lambda task: task.block.module.input_layernorm.weight.zero_(): r"changed input_layernorm\.weight in place",
    }.items():
        model = tiny_llama(context=32).requires_grad_(False)
        blocks = capture_blocks(model, INPUT_IDS)
        with pytest.raises(RunError, match=told):
            list(prune_blocks(blocks, embed(model, blocks, INPUT_IDS, 5), Doubling(change), HALF, 5))


@dataclass(frozen=True)
class MeansIntoBiases:
    """What the pruned weights gave of the mean input goes into the bias (FLAP, An et al., arXiv 2312.11983)."""

    traits = Traits(InputMoments)

    def check(self, pattern: str) -> list[str]:
        return []

    def update_block(self, task: Task, pruned: PrunedBlock) -> PrunedBlock:
        biases = {}
        for name, weight in task.weights.items():
            mean = task.statistics[name].total / task.inputs.shape[1]
            bias = task.block.module.get_parameter(f"{name}.bias").detach()
            biases[f"{name}.bias"] = bias + (weight * ~pruned.keep_masks[name]) @ mean
        return replace(pruned, norms=biases)


def test_an_update_may_move_the_biases_that_a_block_has() -> None:
    found = {}
    for update in (None, MeansIntoBiases()):
        model = tiny("opt").requires_grad_(False)
        with torch.no_grad():
            for name, bias in model.named_parameters():
                bias.fill_(0.5) if name.endswith("layer_norm.bias") else None  # inputs have means then
        blocks = capture_blocks(model, INPUT_IDS % 64)
        pruner = with_update(Uniform("wanda"), update)
        pruned = list(prune_blocks(blocks, embed(model, blocks, INPUT_IDS % 64, 5), pruner, HALF, 5))
        found[update] = [report.loss_after for report, _ in pruned]
        moved = [
            name
            for name, value in pruned[0][1].norms.items()
            if value.equal(model.get_parameter(f"{blocks[0].name}.{name}"))
        ]
        assert len(moved) == (len(blocks[0].linears) if update else 0)
    assert found[MeansIntoBiases()][0] < found[None][0]
