"""A linear's product is right whatever routine computes it, and so is what a search of counts asks of its gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from families import MIXTURES, tiny
from torch import nn

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.linears import Linear
from besa_exp.blocks.observation import observe
from besa_exp.blocks.products import FEW, HAS_ONEDNN, computed_by, is_plain, product
from besa_exp.blocks.pruner import Task
from besa_exp.methods.allocation import Rows
from besa_exp.methods.cuts import count_gradient, counted_linear
from besa_exp.methods.n_of_m import rows_of_groups
from besa_exp.methods.pruners.besa import Besa
from besa_exp.tensors import kernels
from besa_exp.tensors.kernels import rank_in_row, weights_around
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.statistics import InputNorm

INPUT_IDS = torch.randint(1, 64, (5, 24), generator=torch.Generator().manual_seed(3))
MANY = (2, 128, 200, 300)  # samples, tokens, inputs, outputs: enough for oneDNN


class Subclass(nn.Linear):
    """As far as anyone can tell it computes something else."""


def drawn(samples, tokens, columns, rows):
    generator = torch.Generator().manual_seed(0)
    shapes = (samples, tokens, columns), (rows, columns), (rows,), (samples, tokens, rows)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def value_and_gradients(act, inputs, weight, bias, upstream):
    leaves = [value.detach().clone().requires_grad_() for value in (inputs, weight, bias)]
    value = act(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


@pytest.mark.parametrize("shape", [MANY, (1, 3, 5, 7)])
def test_products_and_their_gradients_are_no_further_from_fp64_than_pytorchs(shape):
    inputs, weight, bias, upstream = drawn(*shape)
    found = value_and_gradients(product, inputs, weight, bias, upstream)
    plain = value_and_gradients(nn.functional.linear, inputs, weight, bias, upstream)
    exact = value_and_gradients(nn.functional.linear, *(value.double() for value in (inputs, weight, bias, upstream)))
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        assert ours.shape == true.shape
        assert ours.dtype == torch.float32
        assert float((ours - true).abs().max()) <= 2 * float((theirs - true).abs().max()) + 1e-6


def test_products_take_views_and_no_bias_and_give_only_the_gradients_that_are_asked_for():
    inputs, weight, _, upstream = drawn(*MANY)
    view = torch.empty(MANY[2], *MANY[:2]).permute(1, 2, 0).copy_(inputs).requires_grad_()
    turned = weight.T.contiguous().T
    torch.testing.assert_close(product(view, turned), nn.functional.linear(inputs, weight), rtol=1e-5, atol=1e-4)
    (found,) = torch.autograd.grad(product(view, turned), view, upstream)
    torch.testing.assert_close(found, upstream @ weight, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not HAS_ONEDNN, reason="needs a PyTorch with MKL and oneDNN")
@pytest.mark.parametrize(
    ("shape", "dtype", "by_onednn"),
    [(MANY, torch.float32, True), ((1, 3, 5, 7), torch.float32, False), (MANY, torch.float64, False)],
)
def test_onednn_computes_fp32_products_that_are_worth_its_call(shape, dtype, by_onednn):
    samples, tokens, columns, rows = shape
    assert (samples * tokens * columns * rows >= FEW) == (shape == MANY)
    inputs, weight, _, _ = (value.to(dtype) for value in drawn(*shape))
    step = product(inputs, weight.requires_grad_()).grad_fn
    assert (type(step).__name__ == "_OneDNNBackward") == by_onednn


def linears_of(*modules):
    return {str(place): Linear(module, f"{place}.weight") for place, module in enumerate(modules)}


def test_plain_linears_alone_are_computed_by_what_is_given_and_only_for_a_while():
    plain, other, own = nn.Linear(4, 3), Subclass(4, 3), nn.Linear(4, 3)
    own.forward = lambda input: input  # noqa: A006
    linears = linears_of(plain, other, own)
    assert [is_plain(linear) for linear in linears.values()] == [True, False, False]
    inputs = torch.randn(2, 4)
    expected = [module(inputs) for module in (plain, other, own)]
    seen = []
    hook = plain.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    zero = dict.fromkeys(linears, lambda inputs, weight, bias: inputs @ weight.T * 0 + bias)
    with computed_by(linears, zero):
        assert torch.equal(plain(inputs), plain.bias.expand(2, 3))
        assert torch.equal(other(inputs), expected[1])
        assert own(inputs) is inputs
    hook.remove()
    assert seen == [inputs]
    with computed_by(linears, {}):
        torch.testing.assert_close(plain(input=inputs), expected[0])
    assert torch.equal(plain(inputs), expected[0])
    assert "forward" not in vars(plain)


def test_under_autocast_products_are_its_own_unless_they_are_given():
    module = nn.Linear(200, 300)
    linears, (inputs, *_) = linears_of(module), drawn(*MANY)
    with torch.autocast("cpu", torch.bfloat16):
        with computed_by(linears, {}):
            assert module(inputs).dtype == torch.bfloat16
        with computed_by(linears, {"0": lambda inputs, weight, bias: inputs}):
            assert module(inputs) is inputs


def around(weight, cut, window):
    """The weights around the cuts and the windows' widths, for importances that are magnitudes."""
    out = torch.empty_like(weight)
    return out, weights_around(weight, rank_in_row(weight.abs()), cut, window, weight.shape[1], out)


@pytest.mark.parametrize("shape", [MANY, (3, 5, 30, 4)])
@pytest.mark.parametrize("window", [0.5, 6.0])
def test_a_counted_linear_has_the_gradient_to_its_counts_that_the_gradient_to_its_weights_gives(shape, window):
    inputs, weight, bias, upstream = drawn(*shape)
    columns, rows = shape[2:]
    cut = torch.tensor([0, columns // 2, 1, columns]).repeat(rows)[:rows]
    count = torch.zeros(rows, requires_grad=True)
    leaf = inputs.clone().requires_grad_()
    outputs = counted_linear(leaf, weight, bias, count, lambda: around(weight, cut, window))
    torch.testing.assert_close(outputs, nn.functional.linear(inputs, weight, bias), rtol=1e-5, atol=1e-4)
    by_count, by_input = torch.autograd.grad(outputs, [count, leaf], upstream)
    by_weight = upstream.double().flatten(0, 1).T @ inputs.double().flatten(0, 1)
    expected = kernels.count_gradient(weight, by_weight.float(), rank_in_row(weight.abs()), cut, window)
    torch.testing.assert_close(by_count, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(by_input, upstream @ weight, rtol=1e-5, atol=1e-4)


def test_a_counted_linear_computes_in_what_autocast_says_and_its_gradients_are_fp32():
    inputs, weight, bias, upstream = drawn(*MANY)
    cut, count = torch.full((MANY[3],), 100), torch.zeros(MANY[3], requires_grad=True)
    leaf = inputs.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = counted_linear(leaf, weight, bias, count, lambda: around(weight, cut, 20.0))
    assert outputs.dtype == torch.bfloat16
    outputs.backward(upstream.bfloat16())
    by_weight = upstream.flatten(0, 1).T @ inputs.flatten(0, 1)
    expected = kernels.count_gradient(weight, by_weight, rank_in_row(weight.abs()), cut, 20.0)
    assert count.grad is not None
    assert leaf.grad is not None
    assert count.grad.dtype == leaf.grad.dtype == torch.float32
    assert float((count.grad - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("goal", [Goal(0.5), Goal(0.5, group=8)], ids=["rows", "groups"])
@pytest.mark.parametrize("family", ["llama", next(iter(MIXTURES))])
def test_a_search_goes_the_same_way_where_linears_are_not_plain(family, goal):
    """There the gradient to the weights is formed, and the one to the counts taken from it."""
    courses = []
    for plain in (True, False):
        model = tiny(family)
        block = capture_blocks(model, INPUT_IDS)[0]
        for module in {linear.module for linear in block.linears.values() if is_plain(linear)}:
            module.__class__ = nn.Linear if plain else Subclass
        assert any(is_plain(linear) for linear in block.linears.values()) == plain
        inputs = embed(model, [block], INPUT_IDS, batch_size=5)
        statistics, targets = observe(block, inputs, InputNorm, 1)
        steps = []
        Besa(window=0.5, epochs=2).prune_block(Task(block, inputs, targets, statistics, goal, steps.append))
        courses.append([step.loss for step in steps])
    assert len(set(courses[0])) == len(courses[0]) > 4
    assert courses[0][:3] == pytest.approx(courses[1][:3], rel=1e-5)
    assert courses[0] == pytest.approx(courses[1], rel=1e-3)  # counts between two whole ones to rounding may tip


@pytest.mark.parametrize(
    ("group", "window", "near", "width"), [(None, 0.1, 4, 4.0), (None, 0.01, 1, 1.0), (8, 0.1, 10, 2.0)]
)
def test_a_searchs_gradient_looks_at_a_window_of_the_row_or_at_both_sides_of_the_cut_in_each_group(
    group, window, near, width
):
    """In groups two levels at least: one weight below the cut and one above, in each of the five groups."""
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    make = Rows.of if group is None else partial(rows_of_groups, group=group)
    rows = make({"one": weight}, lambda name: weight.abs(), "row")
    cut, levels = torch.full((3,), group // 2 if group else 20), rows.num_levels("one")
    ranks, out = max(window * levels, rows.narrowest), torch.empty_like(weight)
    assert weights_around(weight, rows.ranks["one"], cut, ranks, levels, out).tolist() == [max(width, 1.0)] * 3
    assert (out != 0).sum(dim=1).tolist() == [near] * 3
    assert torch.equal(out[out != 0], weight[out != 0])
    gradient = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    found = count_gradient(weight, gradient, rows.ranks["one"], cut, ranks, levels)
    torch.testing.assert_close(found, -(out * gradient).sum(dim=1) / width)
