"""The block loop sees what the model does: same arguments, same hidden states, shared inputs, loud failures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, MIXTURES, tiny
from tiny_llama import INPUT_IDS, tiny_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from besa_exp.blocks.block import capture_blocks, discover_blocks, embed
from besa_exp.blocks.linears import find_linears
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.observation import observe
from besa_exp.blocks.pruner import Traits
from besa_exp.blocks.replay_check import check_replay
from besa_exp.errors import RunError
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.statistics import Hessian, InputMoments, InputNorm


def weight_of(model, path) -> torch.Tensor:
    return model.get_parameter(f"model.layers.{path}.weight")


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_replayed_blocks_reproduce_the_models_hidden_states_for_all_samples(family):
    model = tiny(family)
    blocks = capture_blocks(model, INPUT_IDS)
    assert len(blocks) == model.config.num_hidden_layers
    check_replay(model, blocks, INPUT_IDS)
    hidden = embed(model, blocks, INPUT_IDS, batch_size=2)
    for block in blocks:
        hidden = block.outputs(hidden, batch_size=3)
    own = []
    hook = blocks[-1].module.register_forward_hook(
        lambda module, args, output: own.append(output[0] if isinstance(output, tuple) else output)
    )
    model(INPUT_IDS, use_cache=False)
    hook.remove()
    torch.testing.assert_close(hidden, own[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_compute_dtype_rounds_products_and_leaves_all_else_in_the_weights_dtype(family):
    model = tiny(family)
    blocks = capture_blocks(model, INPUT_IDS)
    hidden = embed(model, blocks, INPUT_IDS, batch_size=5)
    exact, rounded = blocks[0], replace(blocks[0], compute_dtype=torch.bfloat16)
    expected, found = exact(hidden), rounded(hidden)
    assert found.dtype == expected.dtype == torch.float32
    assert 1e-5 < float((found - expected).norm() / expected.norm()) < 0.03  # eps of bf16: 0.008
    weights = {name: linear.weight.detach().requires_grad_() for name, linear in rounded.linears.items()}
    gradients = torch.autograd.grad(rounded(hidden, weights).square().sum(), [*weights.values()])
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gpt2", next(iter(MIXTURES))])
def test_weights_that_a_pass_rounds_once_give_what_autocast_rounds_for_each_batch(family):
    model = tiny(family)
    block = replace(capture_blocks(model, INPUT_IDS)[0], compute_dtype=torch.bfloat16)
    hidden = embed(model, [block], INPUT_IDS, batch_size=5)
    weights = {name: linear.weight * 1.5 for name, linear in [*block.linears.items()][:2]}
    for given in (None, weights):
        found = block.outputs(hidden, 2, given)
        assert found.dtype == torch.float32
        assert torch.equal(found, torch.cat([block(batch, given) for batch in hidden.split(2)]))
    assert not torch.equal(found, block.outputs(hidden, 2))


@pytest.mark.parametrize("statistic", [InputNorm, InputMoments, Hessian])
def test_statistics_are_not_rounded_where_products_are(statistic):
    seen, inputs = statistic(24, torch.device("cpu")), torch.randn(3, 40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        seen.add(inputs)
    seen.sum_over_ranks(3)
    exact = inputs.double().flatten(0, 1)
    torch.testing.assert_close(seen.squared_norm.double(), exact.square().sum(dim=0) / 3, rtol=1e-6, atol=0)
    if isinstance(seen, Hessian):
        torch.testing.assert_close(seen.matrix.double(), 2 / 3 * exact.T @ exact, rtol=1e-5, atol=1e-5)


def test_a_model_that_calls_its_blocks_unlike_the_loop_is_refused_by_the_self_check():
    model = tiny("llama")
    blocks = capture_blocks(model, INPUT_IDS)
    args, kwargs = blocks[1].arguments(5)
    cosines, sines = kwargs["position_embeddings"]
    elsewhere = kwargs | {"position_embeddings": (cosines.flip(1), sines.flip(1))}
    broken = [blocks[0], replace(blocks[1], arguments=lambda size: (args, elsewhere))]
    with pytest.raises(RunError, match=r"model\.layers\.1.*does not reproduce"):
        check_replay(model, broken, INPUT_IDS)


def test_states_that_overflow_are_no_fault_of_the_replay():
    model = tiny_llama(dtype=torch.float16)
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data.mul_(1e4)
    with pytest.raises(RunError, match=r"layers\.1: .* not finite .* overflows in float16; set model\.dtype=float32"):
        check_replay(model, capture_blocks(model, INPUT_IDS), INPUT_IDS)


def test_a_model_without_blocks_is_refused_with_what_was_looked_for():
    with pytest.raises(RunError, match="ModuleList"):
        discover_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_a_linear_without_weights_is_none():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = nn.Parameter(torch.empty(0, 4))
    assert [*find_linears(module)] == ["0"]


def test_linears_that_are_given_the_same_tensor_share_one_statistic():
    model = tiny("llama")
    blocks = capture_blocks(model, INPUT_IDS)
    statistics, _ = observe(blocks[0], embed(model, blocks, INPUT_IDS, 5), Hessian, 2)
    attention = {id(statistics[f"self_attn.{name}_proj"]) for name in "qkv"}
    mlp = {id(statistics["mlp.gate_proj"]), id(statistics["mlp.up_proj"])}
    assert len(attention) == len(mlp) == 1
    assert len({id(statistic) for statistic in statistics.values()}) == 4


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_statistics_and_outputs_do_not_depend_on_the_batch_size(batch_size):
    model = tiny("llama")
    blocks = capture_blocks(model, INPUT_IDS)
    inputs = embed(model, blocks, INPUT_IDS, batch_size)
    statistics, outputs = observe(blocks[0], inputs, InputNorm, batch_size)
    recorded = []
    hook = (
        blocks[0]
        .linears["mlp.down_proj"]
        .module.register_forward_pre_hook(lambda module, args: recorded.append(args[0]))
    )
    whole = blocks[0](inputs)
    hook.remove()
    torch.testing.assert_close(outputs, whole, rtol=1e-4, atol=1e-6)
    expected = recorded[0].double().square().sum(dim=(0, 1)) / len(INPUT_IDS)
    torch.testing.assert_close(statistics["mlp.down_proj"].squared_norm.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("statistic", "value"), [(InputNorm, "squared_norm"), (InputMoments, "total"), (Hessian, "matrix")]
)
def test_inputs_that_a_model_flattens_into_one_axis_of_tokens_count_the_same(statistic, value):
    inputs = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    whole, flat = statistic(5, inputs.device), statistic(5, inputs.device)
    whole.add(inputs)
    flat.add(inputs.view(21, 5))
    for found in (whole, flat):
        found.sum_over_ranks(3)
    assert torch.equal(getattr(whole, value), getattr(flat, value))
    assert getattr(whole, value).shape[-1] == 5


@pytest.mark.parametrize("columns", [1, 255, 256, 700])
def test_the_hessian_is_the_symmetric_mean_of_products_whatever_panels_it_is_summed_in(columns):
    inputs = torch.randn(3, 9, columns, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(columns, inputs.device)
    hessian.add(inputs[:2])
    hessian.add(inputs[2:])
    hessian.sum_over_ranks(3)
    tokens = inputs.double().flatten(0, 1)
    torch.testing.assert_close(hessian.matrix.double(), 2 / 3 * tokens.T @ tokens, rtol=1e-4, atol=1e-5)
    assert torch.equal(hessian.matrix, hessian.matrix.T)


def test_statistics_are_taken_on_the_pruned_prefix():
    model = tiny("llama")
    blocks = capture_blocks(model, INPUT_IDS)
    inputs = embed(model, blocks, INPUT_IDS, 5)
    list(prune_blocks(blocks[:1], inputs.clone(), Uniform(), Goal(0.9), 5))
    pruned_prefix = blocks[0].outputs(inputs, 5)
    fresh = tiny("llama")
    fresh_blocks = capture_blocks(fresh, INPUT_IDS)
    (_, second) = list(prune_blocks(fresh_blocks, embed(fresh, fresh_blocks, INPUT_IDS, 5), Uniform(), Goal(0.9), 5))
    statistics, _ = observe(blocks[1], pruned_prefix, InputNorm, 5)
    importance = blocks[1].linears["mlp.up_proj"].weight.abs() * statistics["mlp.up_proj"].squared_norm.sqrt()
    count = int(0.9 * importance.shape[1])
    expected = importance >= importance.sort(dim=1).values[:, count : count + 1]
    assert torch.equal(second[1].keep_masks["mlp.up_proj"], expected)


def test_a_statistic_that_overflows_stops_the_run_naming_block_and_linear():
    model = tiny_llama(context=32)
    model.requires_grad_(False)
    weight_of(model, "1.mlp.up_proj")[0] = float("inf")
    blocks = capture_blocks(model, INPUT_IDS)
    with pytest.raises(RunError, match=r"model\.layers\.1\.mlp\.down_proj.*not finite"):
        list(prune_blocks(blocks, embed(model, blocks, INPUT_IDS, 5), Uniform(), Goal(0.5), 5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_stops_the_run_naming_block_and_linear(value):
    model = tiny_llama(context=32).requires_grad_(False)
    weight_of(model, "1.mlp.up_proj")[3, 5] = value
    blocks = capture_blocks(model, INPUT_IDS)
    with pytest.raises(RunError, match=r"model\.layers\.1\.mlp\.up_proj: the pruned weights are not finite"):
        list(prune_blocks(blocks, embed(model, blocks, INPUT_IDS, 5), Uniform("magnitude", "linear"), Goal(0.5), 5))


def test_a_loss_that_is_not_finite_stops_the_run_naming_the_block():
    model = tiny_llama(context=32).half().requires_grad_(False)
    weight_of(model, "0.mlp.down_proj").mul_(1e4)
    blocks = capture_blocks(model, INPUT_IDS)
    with pytest.raises(RunError, match=r"model\.layers\.[01]"):
        list(prune_blocks(blocks, embed(model, blocks, INPUT_IDS, 5), Besa(), Goal(0.5), 5))


class Seeing(Uniform):
    @property
    def traits(self) -> Traits:
        return Traits()


def test_what_a_blind_pruner_gives_takes_the_probe_samples_alone():
    ids, passed = torch.arange(24 * 8).view(24, 8) % 90, []

    def reports_by(pruner):
        model = tiny_llama(context=32).requires_grad_(False)
        blocks = capture_blocks(model, ids)
        passed.append(0)

        def count(module, args):
            passed[-1] += len(args[0])

        blocks[1].module.register_forward_pre_hook(count)
        return [report for report, _ in prune_blocks(blocks, embed(model, blocks, ids, 8), pruner, Goal(0.5), 8)]

    blind, seeing, _ = map(reports_by, (Uniform("magnitude"), Seeing("magnitude"), Uniform()))
    assert [report.linears for report in blind] == [report.linears for report in seeing]
    losses = [[report.loss_after for report in reports] for reports in (blind, seeing)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert passed[1] == passed[2] == passed[0] + 2 * (24 - 3)  # the block as it is and pruned


class Products(TorchDispatchMode):
    """Counts products, and the numbers that are made in fp32."""

    def __init__(self):
        super().__init__()
        self.products, self.fp32 = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.products += [str(func)] if "mm" in str(func) else []
        self.fp32 = max(self.fp32, found.numel() if found.dtype == torch.float32 else 0)
        return found


def test_a_gpu_sums_a_hessian_of_16_bit_inputs_from_the_inputs_as_they_are():
    """Seen on the meta device: one product a panel, whose sums are fp32, and no copy of the inputs in fp32."""
    inputs = torch.empty(4096, 512, dtype=torch.bfloat16, device="meta")
    hessian, seen = Hessian(512, inputs.device), Products()
    with seen:
        hessian.add(inputs)
    assert seen.products == ["aten.mm.dtype"] * len(hessian.panels)
    assert seen.fp32 <= hessian.upper.numel() < inputs.numel()
    with seen:
        hessian.add(inputs.float())
    assert seen.products[len(hessian.panels) :] == ["aten.addmm_.default"] * len(hessian.panels)
