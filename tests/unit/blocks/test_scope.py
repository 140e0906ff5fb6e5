"""Sub-blocks, blocks and pairs: where a block parts, what each part computes, and what is reconstructed together."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, MIXTURES, tiny
from tiny_llama import tiny_llama

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.observation import observe
from besa_exp.blocks.pruner import Task
from besa_exp.blocks.units import by_block, sub_blocks, unit_ends, units
from besa_exp.checkpoints.streaming import open_streamed
from besa_exp.errors import RunError
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.besa_joint import BesaJoint
from besa_exp.methods.pruners.quantised import Quantised
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.quantisation import Quantiser
from besa_exp.tensors.statistics import InputNorm

SIDE_BY_SIDE = {"gpt_neox", "falcon"}
INPUT_IDS = torch.randint(1, 64, (5, 24), generator=torch.Generator().manual_seed(3))
IDS = torch.randint(0, 258, (10, 32), generator=torch.Generator().manual_seed(1))
DENSE = tiny_llama(context=32).requires_grad_(False)


def blocks_and_inputs(model, ids=INPUT_IDS):
    blocks = capture_blocks(model, ids)
    return blocks, embed(model, blocks, ids, 2)


def prune(pruner, sparsity=0.5):
    """The pruned tiny Llama, and block by block what was reported and decided."""
    model = copy.deepcopy(DENSE)
    blocks, inputs = blocks_and_inputs(model, IDS)
    grouped = units(blocks, together := pruner.traits.blocks_together)
    results = []
    for report, pruned in prune_blocks(grouped, inputs, pruner, Goal(sparsity), 4):
        results += by_block(grouped[report.index // together], report, pruned)
    return model, results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted((FAMILIES | MIXTURES).keys() - SIDE_BY_SIDE))
def test_a_block_parts_where_attention_ends_in_every_family(family, dtype):
    blocks, inputs = blocks_and_inputs(tiny(family).to(dtype))
    (attention, first), (mlp, second) = sub_blocks(blocks[0], inputs)
    of_attention = {name for name in blocks[0].linears if "attn" in name or "attention" in name}
    assert of_attention
    assert set(first) == of_attention
    assert set(second) == blocks[0].linears.keys() - of_attention
    assert torch.equal(mlp(inputs), blocks[0](inputs))
    assert attention(inputs).shape == inputs.shape
    assert not torch.equal(attention(inputs), mlp(inputs))


def test_blocks_that_are_pruned_together_compute_in_the_dtype_of_each():
    blocks, inputs = blocks_and_inputs(tiny("llama"))
    (exact,) = units(blocks[:2], 2)
    (rounded,) = units([replace(block, compute_dtype=torch.bfloat16) for block in blocks[:2]], 2)
    assert not torch.equal(exact(inputs), rounded(inputs))
    torch.testing.assert_close(exact(inputs), rounded(inputs), rtol=0.05, atol=0.05)


def test_attention_as_a_part_gives_the_state_after_its_residual():
    blocks, inputs = blocks_and_inputs(DENSE, IDS)
    states = []
    norm = blocks[0].module.get_submodule("post_attention_layernorm")
    hook = norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    blocks[0](inputs)
    hook.remove()
    (attention, names), _ = sub_blocks(blocks[0], inputs)
    assert torch.equal(attention(inputs), states[0])
    weights = {name: torch.zeros_like(attention.linears[name].weight) for name in names}
    assert torch.equal(attention(inputs, weights), inputs)


@pytest.mark.parametrize("family", sorted(SIDE_BY_SIDE))
def test_attention_and_mlp_side_by_side_are_refused_with_the_block_and_the_remedy(family):
    blocks, inputs = blocks_and_inputs(tiny(family))
    with pytest.raises(RunError, match=r"\w+\.0: .* cannot be reconstructed apart.*pruner\.scope=block"):
        sub_blocks(blocks[0], inputs)


def test_a_pair_is_one_block_after_the_other_with_the_linears_of_both():
    blocks, inputs = blocks_and_inputs(DENSE, IDS)
    (pair,) = units(blocks, 2)
    expected = blocks[1](blocks[0](inputs))
    assert torch.equal(pair(inputs), expected)
    assert pair.layers == tuple(blocks)
    assert next(iter(pair.linears)) == "0.self_attn.q_proj"
    assert len(pair.linears) == 14
    weights = {"1.mlp.down_proj": torch.zeros_like(blocks[1].linears["mlp.down_proj"].weight)}
    own = {"mlp.down_proj": weights["1.mlp.down_proj"]}
    assert torch.equal(pair(inputs, weights), blocks[1](blocks[0](inputs), own))
    statistics, _ = observe(pair, inputs, InputNorm, 4)
    alone, _ = observe(blocks[1], blocks[0].outputs(inputs, 4), InputNorm, 4)
    torch.testing.assert_close(statistics["1.mlp.up_proj"].squared_norm, alone["mlp.up_proj"].squared_norm)


def test_units_end_with_what_is_left_over():
    blocks, _ = blocks_and_inputs(DENSE, IDS)
    five = [*blocks, *blocks, blocks[0]]
    assert [len(unit.layers) for unit in units(five, 2)] == [2, 2, 1]
    assert unit_ends(5, 2) == {0, 2, 4, 5}
    assert unit_ends(3, 1) == {0, 1, 2, 3}
    assert Quantised(Besa(scope="pair"), "prune").traits.blocks_together == 2
    assert Besa(scope="sub_block").traits.blocks_together == Uniform().traits.blocks_together == 1


def test_a_uniform_method_prunes_a_pair_as_it_prunes_the_blocks_given_their_inputs():
    """What a pair changes is that the second block's inputs come from the dense first one."""
    blocks, inputs = blocks_and_inputs(copy.deepcopy(DENSE), IDS)
    (pair,) = units(blocks, 2)
    ((report, pruned),) = prune_blocks([pair], inputs.clone(), Uniform(), Goal(0.5), 4)
    fresh, _ = blocks_and_inputs(copy.deepcopy(DENSE), IDS)
    statistics, _ = observe(fresh[1], fresh[0].outputs(inputs, 4), InputNorm, 4)
    alone = Uniform().prune_block(Task(fresh[1], inputs, inputs, statistics, Goal(0.5)))
    pruned = replace(pruned, permutations={name: mask[0].long() for name, mask in pruned.keep_masks.items()})
    (_, _, first), (_, told, second) = by_block(pair, report, pruned)
    assert first.permutations.keys() == second.permutations.keys() == alone.keep_masks.keys()
    assert first.keep_masks.keys() == second.keep_masks.keys() == alone.keep_masks.keys()
    for name, mask in second.keep_masks.items():
        assert torch.equal(mask, alone.keep_masks[name])
        assert (blocks[1].linears[name].weight == 0).equal(~mask)
    assert told.index == 1


@pytest.mark.parametrize("quantiser", [None, Quantiser()])
@pytest.mark.parametrize("scope", ["sub_block", "pair"])
def test_the_budget_is_met_by_what_shares_it_and_reports_stay_block_by_block(scope, quantiser):
    besa = Besa(scope=scope, lr=0.2)
    model, results = prune(BesaJoint(besa, quantiser) if quantiser else besa, sparsity=0.6)
    assert [report.index for _, report, _ in results] == [0, 1]
    for block, report, pruned in results:
        names = [linear.name for linear in report.linears]
        assert names == list(block.linears) == list(pruned.keep_masks)
        for linear in report.linears:
            weight = model.get_parameter(f"model.layers.{report.index}.{linear.name}.weight")
            assert torch.equal(weight != 0, pruned.keep_masks[linear.name])
            assert linear.pruned == int((weight == 0).sum())
    asked = {
        (place, name): float((rows * mask.shape[1]).sum())
        for place, (_, _, pruned) in enumerate(results)
        for (name, rows), mask in zip(pruned.allocated.items(), pruned.keep_masks.values(), strict=True)
    }
    sizes = {
        (place, name): linear.weight.numel()
        for place, (b, *_) in enumerate(results)
        for name, linear in b.linears.items()
    }
    whose = {
        "sub_block": lambda place, name: (place, "attn" in name),
        "pair": lambda place, name: None,
    }[scope]
    for group in {whose(*key) for key in asked}:
        members = [key for key in asked if whose(*key) == group]
        assert abs(sum(asked[key] for key in members) - 0.6 * sum(sizes[key] for key in members)) <= 1
    of_blocks = [sum(asked[key] for key in asked if key[0] == place) for place in (0, 1)]
    assert (abs(of_blocks[0] - of_blocks[1]) > 1) == (scope == "pair")


def test_each_sub_block_is_learned_under_its_own_loss_and_the_report_is_of_the_block():
    whole, apart = (prune(Besa(scope=scope))[1][0] for scope in ("block", "sub_block"))
    assert apart[1].loss_before == pytest.approx(whole[1].loss_before, rel=0.02)
    assert apart[1].loss_after < apart[1].loss_before
    steps = apart[1].steps
    assert [step.step for step in steps] == list(range(len(steps)))
    assert len(steps) == 2 * len(whole[1].steps)
    assert not torch.equal(apart[2].keep_masks["mlp.up_proj"], whole[2].keep_masks["mlp.up_proj"])


def test_a_pair_lowers_the_loss_at_its_end_and_tells_it_with_both_blocks():
    _, ((_, first, _), (_, second, _)) = prune(Besa(scope="pair"))
    assert (first.loss_before, first.loss_after) == (second.loss_before, second.loss_after)
    assert first.loss_after < first.loss_before
    assert first.seconds == second.seconds
    assert first.steps
    assert not second.steps


def test_a_scope_that_is_none_is_refused_by_key_and_value():
    with pytest.raises(ValueError, match=r"pruner\.scope=layer: must be one of sub_block, block, pair"):
        Besa(scope="layer")


def test_both_blocks_of_a_pair_are_in_memory_together_and_leave_together(tmp_path):
    DENSE.save_pretrained(tmp_path, max_shard_size="20KB")
    model, weights = open_streamed(tmp_path, "auto", torch.device("cpu"), False)
    blocks, inputs = blocks_and_inputs(model, IDS)
    whole, _ = blocks_and_inputs(DENSE, IDS)
    for pair in weights.resident(units(blocks, 2)):
        assert not any(parameter.is_meta for parameter in pair.module.parameters())
        assert torch.equal(pair(inputs), whole[1](whole[0](inputs)))
    assert all(parameter.is_meta for block in blocks for parameter in block.module.parameters())


def test_a_block_is_the_only_layer_of_itself():
    blocks, _ = blocks_and_inputs(DENSE, IDS)
    assert blocks[0].layers == (blocks[0],)
    assert units(blocks, 1) == blocks
    assert replace(blocks[0], parts=tuple(blocks)).layers == tuple(blocks)
