"""Experts: each is calibrated on the tokens its router sends it, and those that few reach on all."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from families import tiny
from torch import nn

from besa_exp.blocks import observation
from besa_exp.blocks.block import Block, capture_blocks, embed
from besa_exp.blocks.linears import discover_linears, room_like, stacked, with_weights
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.observation import FEW_TOKENS, observe
from besa_exp.methods.allocation import Rows
from besa_exp.methods.cuts import Buffers
from besa_exp.methods.pruners.besa import besa_step
from besa_exp.methods.pruners.besa_reconstruct import BesaReconstruct
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.methods.tuning import Tuning
from besa_exp.methods.updates.barber import Barber
from besa_exp.methods.updates.reconstruct import Reconstruct
from besa_exp.methods.updates.updated import Updated
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.statistics import Hessian, InputNorm

SAMPLES, LENGTH = 8, 16
SHORT = Tuning(epochs=1, batch_size=1, lr=0.01)
INPUT_IDS = torch.randint(3, 64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(5))


def mixture(family) -> Any:
    """The first block that has one, what enters it, and the routing there: tokens [token hidden], experts [token k]."""
    model = tiny(family)
    blocks = capture_blocks(model, INPUT_IDS)
    inputs = embed(model, blocks, INPUT_IDS, 4)
    block = next(block for block in blocks if any("experts" in name for name in block.linears))
    for earlier in blocks[: block.index]:
        inputs = earlier.outputs(inputs, 4)
    seen = []
    experts: Any = block.module.get_submodule("mlp.experts")
    hook = experts.register_forward_pre_hook(lambda module, args: seen.append((args[0].double(), args[1])))
    block(inputs)
    hook.remove()
    return block, inputs, experts, *seen[0]


def down_inputs(family, experts, expert, tokens):
    """What the expert's down projection is given, written out in fp64 for each family's own formula."""
    weight = experts.gate_up_proj[expert].double()
    if family != "gpt_oss":
        gate, up = (tokens @ weight.T).chunk(2, dim=-1)
        return nn.functional.silu(gate) * up
    both = tokens @ weight + experts.gate_up_proj_bias[expert].double()
    gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_an_experts_statistics_are_of_the_tokens_that_its_router_sends_it(family, batch_size, monkeypatch):
    monkeypatch.setattr(observation, "FEW_TOKENS", 0)
    block, inputs, experts, hidden, chosen = mixture(family)
    norms, _ = observe(block, inputs, InputNorm, batch_size)
    hessians, _ = observe(block, inputs, Hessian, batch_size)
    for expert in range(4):
        tokens = hidden[(chosen == expert).any(dim=-1)]
        assert 0 < len(tokens) < len(hidden)
        for kind, given in (("gate_up_proj", tokens), ("down_proj", down_inputs(family, experts, expert, tokens))):
            name = f"mlp.experts.{expert}.{kind}"
            expected = given.square().sum(dim=0) / SAMPLES
            torch.testing.assert_close(norms[name].squared_norm.double(), expected, rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(
                hessians[name].matrix.double(), 2 / SAMPLES * given.T @ given, rtol=1e-4, atol=1e-6
            )


def test_experts_that_few_tokens_reach_are_calibrated_on_all_and_named_in_the_log(caplog):
    block, inputs, experts, hidden, _ = mixture("mixtral")
    router = block.module.mlp.gate.weight
    router.zero_()
    router[2] = hidden.float().sum(dim=0)  # most tokens go to expert 2, all go to one of 0, 1 and 3 besides
    router[3] = -router[2]
    tokens = []
    hook = experts.register_forward_pre_hook(lambda module, args: tokens.append(args[1]))
    block(inputs)
    hook.remove()
    reached = [int((tokens[0] == expert).sum()) for expert in range(4)]
    few = [expert for expert in range(4) if reached[expert] < FEW_TOKENS]
    assert few
    assert len(few) < 4
    with caplog.at_level(logging.INFO, "besa_exp"):
        found, outputs = observe(block, inputs, InputNorm, 3)
    named = ", ".join(f"{expert} ({reached[expert]})" for expert in few)
    assert f"mlp.experts: fewer than {FEW_TOKENS} tokens reached experts {named}; calibrated on all" in caplog.text
    for expert in few:
        for kind, given in (("gate_up_proj", hidden), ("down_proj", down_inputs("mixtral", experts, expert, hidden))):
            expected = given.square().sum(dim=0) / SAMPLES
            squared = found[f"mlp.experts.{expert}.{kind}"].squared_norm.double()
            torch.testing.assert_close(squared, expected, rtol=1e-4, atol=1e-9)
    in_place, written = observe(block, inputs, InputNorm, 3, out=inputs)  # as a budget's survey does
    assert written is inputs
    torch.testing.assert_close(inputs, outputs)
    assert all(torch.equal(in_place[name].total, own.total) for name, own in found.items())


class Experts(nn.Module):
    """A mixture of separate modules, as checkpoints with their own code have: tokens go to expert 0 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.shared_gate = nn.Linear(8, 3, bias=False), nn.Linear(8, 1)
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, hidden):
        return hidden + self.experts[0](hidden) * torch.sigmoid(self.shared_gate(hidden)) + self.router(hidden).sum()


def test_separate_experts_that_no_token_reaches_are_pruned_by_magnitude_and_named_in_the_log(caplog):
    inputs = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 8)
    results = {}
    for pruner in (Uniform(), Uniform("magnitude", "linear")):
        torch.manual_seed(1)
        module = Experts().requires_grad_(False)
        block = Block(0, "layers.0", module, discover_linears(module), lambda batch_size: ((), {}))
        with caplog.at_level(logging.INFO, "besa_exp"):
            ((_, results[pruner]),) = prune_blocks([block], inputs.clone(), pruner, Goal(0.5, (4, 8)), 2)
    wanda, magnitude = (results[pruner].keep_masks for pruner in (Uniform(), Uniform("magnitude", "linear")))
    assert sorted(wanda) == ["experts.0", "experts.1", "experts.2"]
    assert not torch.equal(wanda["experts.0"], magnitude["experts.0"])
    assert torch.equal(wanda["experts.1"], magnitude["experts.1"])
    assert "layers.0.experts.1: no token reached it; its weights' magnitude decides" in caplog.text
    assert "experts.0" not in caplog.text


class Sorted(nn.Module):
    """A mixture of separate modules: tokens go to expert 0 or 1, by the sign of their first number."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))

    def forward(self, hidden):
        tokens = hidden.flatten(0, 1)
        sent = [tokens[:, 0] >= 0, tokens[:, 0] < 0]
        out = torch.zeros_like(tokens)
        for expert, own in zip(self.experts, sent, strict=True):
            if own.any():
                out[own] = expert(tokens[own])
        return out.view_as(hidden)


@pytest.mark.parametrize("statistic", [InputNorm, Hessian])
def test_the_statistic_of_a_separate_expert_does_not_depend_on_batches_that_miss_it(statistic):
    module = Sorted().requires_grad_(False)
    block = Block(0, "layers.0", module, discover_linears(module), lambda batch_size: ((), {}))
    inputs = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    inputs[:3, :, 0] = inputs[:3, :, 0].abs()
    inputs[3:, :, 0] = -inputs[3:, :, 0].abs()  # one sample of four, so that most batches of one miss expert 1
    for batch_size in (1, 4):
        found, _ = observe(block, inputs, statistic, batch_size)
        for expert, samples in enumerate((inputs[:3], inputs[3:])):
            expected = samples.double().square().sum(dim=(0, 1)) / 4
            torch.testing.assert_close(found[f"experts.{expert}"].squared_norm.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "pruner", [BesaReconstruct(SHORT), Updated(Uniform(), Reconstruct(SHORT)), Updated(Uniform(), Barber())]
)
def test_separate_experts_that_no_token_reaches_hold_up_nothing_that_learns(pruner):
    torch.manual_seed(1)
    module = Experts().requires_grad_(False)
    block = Block(0, "layers.0", module, discover_linears(module), lambda batch_size: ((), {}))
    inputs = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    ((_, found),) = prune_blocks([block], inputs, pruner, Goal(0.5), 2)
    assert sum(int(mask.sum()) for mask in found.keep_masks.values()) == 96


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])  # stored [expert out in] and [expert in out]
def test_masked_weights_of_a_stack_are_not_copied_to_be_stacked(family):
    block = mixture(family)[0]
    own = {name: linear.weight.detach() for name, linear in block.linears.items()}
    rooms = room_like(own)
    for name, room in rooms.items():
        assert room.stride() == own[name].stride()
        room.copy_(own[name])  # one does not write into another
    parameters = with_weights(block.module, block.linears, rooms)
    for kind in ("gate_up_proj", "down_proj"):
        found = parameters[f"mlp.experts.{kind}"]
        assert torch.equal(found, block.module.get_parameter(f"mlp.experts.{kind}"))
        assert found.data_ptr() == rooms[f"mlp.experts.0.{kind}"].data_ptr()
    apart = {name: room.clone() for name, room in rooms.items()}
    assert torch.equal(with_weights(block.module, block.linears, apart)["mlp.experts.down_proj"], found)


def test_what_lies_stacked_has_the_gradient_of_what_is_stacked():
    piece = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    for parts in (piece.unbind(), [part.clone() for part in piece.unbind()]):
        leaves = [part.requires_grad_() for part in parts]
        gradients = torch.autograd.grad(stacked(leaves), leaves, upstream)
        assert torch.equal(torch.stack(gradients), upstream)
    assert stacked([*piece.unbind()][::-1]).data_ptr() != piece.data_ptr()


@pytest.mark.parametrize(("family", "together"), [("qwen3_moe", True), ("mixtral", True), ("gpt_oss", False)])
def test_the_experts_of_a_stack_are_masked_and_differentiated_in_one_pass_as_each_by_itself(family, together):
    block, inputs, experts, _, _ = mixture(family)
    targets = block.outputs(inputs, 4) + 0.1
    own = {name: linear.weight.detach() for name, linear in block.linears.items()}

    def step(weights):
        rows = Rows.of(weights, lambda name: weights[name].abs(), "row")
        room, total = Buffers.like(weights), round(0.4 * rows.num_weights)
        loss, (gradient,) = besa_step(
            block, inputs, targets, rows, torch.full_like(rows.capacity, 0.4), total, 0.2, room
        )
        return loss, gradient, [len(names) for names in room.together if len(names) > 1]

    loss, gradient, stacks = step(own)
    alone_loss, alone, none = step({name: weight.clone() for name, weight in own.items()})
    assert stacks == [len(experts.down_proj)] * 2 * together
    assert none == []
    assert torch.equal(loss, alone_loss)
    torch.testing.assert_close(gradient, alone, rtol=1e-5, atol=1e-9)
