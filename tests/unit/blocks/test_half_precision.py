"""What a search learns from in fp16 is what it learns from in fp32, at the magnitudes of large models.

At hidden 4096 and states of size 1, dL/dY of 2,048 tokens is about 2 error / (2048 x 4096 x size): below the smallest
number of fp16. Here hidden is 64, and the states are 64 times as large instead.
"""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_llama import tiny_llama

from besa_exp.blocks.block import capture_blocks
from besa_exp.blocks.course import Course
from besa_exp.methods.allocation import Rows
from besa_exp.methods.cuts import Buffers
from besa_exp.methods.pruners.besa import besa_step
from besa_exp.tensors.importance import magnitude_importance
from besa_exp.tensors.losses import LOSSES

SAMPLES, LENGTH, SIZE = 8, 256, 64.0


def step_in(dtype, loss, sparsity=0.5, dense=True):
    """Of the second block, half of each row pruned; the same weights and states in both dtypes."""
    model = torch.nn.Module.to(tiny_llama(context=LENGTH), torch.float16)
    model = torch.nn.Module.to(model, dtype).requires_grad_(False)
    ids = torch.randint(0, 256, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    block = capture_blocks(model, ids)[1]
    hidden = (SIZE * torch.randn(SAMPLES, LENGTH, 64, generator=torch.Generator().manual_seed(1))).half().to(dtype)
    weights = {name: linear.weight.detach() for name, linear in block.linears.items()}
    rows = Rows.of(weights, lambda name: magnitude_importance(weights[name].float()), "row")
    targets, total = block.outputs(hidden, SAMPLES), round(sparsity * rows.num_weights)
    if not dense:  # the block passes its inputs on: nothing depends on its counts
        for weight in weights.values():
            weight.zero_()
    start, room = torch.full_like(rows.capacity, sparsity), Buffers.like(weights)
    return rows, block, *besa_step(block, hidden, targets, rows, start, total, 0.1, room, LOSSES[loss])


@pytest.mark.parametrize("loss", ["token", "channel"])
def test_the_gradient_of_every_linears_rows_is_that_of_fp32(loss):
    gradients = {}
    for dtype in (torch.float16, torch.float32):
        rows, _, _, (gradient,) = step_in(dtype, loss)
        gradients[dtype] = rows.by_linear(gradient)
    for name in rows.weights:
        half, full = gradients[torch.float16][name], gradients[torch.float32][name]
        assert float(torch.cosine_similarity(half, full, dim=0)) >= 0.995, name
        assert 0.99 < float(half.norm() / full.norm()) < 1.01, name


def test_a_step_whose_gradient_is_zero_everywhere_says_so(caplog):
    _, block, loss, (gradient,) = step_in(torch.float32, "token", dense=False)
    with caplog.at_level(logging.WARNING):
        course = Course(block)
        course.add(loss, 0.5, gradient)
        course.add(loss, 0.5, gradient)
    (told,) = caplog.messages  # once a search, and no other dtype is advised than the one there is
    assert "layers.1: the gradient of step 0 is zero everywhere although the loss is" in told
    assert "lower sparsity" in told


def test_a_step_without_a_loss_says_nothing(caplog):
    _, block, loss, (gradient,) = step_in(torch.float32, "token", sparsity=0.0)
    assert loss == 0
    Course(block).add(loss, 0.0, gradient)
    assert not caplog.text
