"""Block reconstruction of the whole model: its loss and gradients against literal ones, window by window."""

from __future__ import annotations

import copy

import pytest
import torch
from pruned_llama import WINDOWS, assert_zeros_exact, pruned_llama, weights_of
from tiny_llama import tiny_llama

from besa_exp.recovery.descent import Adam, taking_gradients
from besa_exp.recovery.reconstruction import BLOCKS_OF, Blocks, Reconstruction

TEXT = WINDOWS[:3]
BLOCKS = 4


def models(dtype=torch.float32):
    """A pruned model of four blocks, what is kept, and the dense one."""
    model, keep = pruned_llama(dtype=dtype, num_hidden_layers=BLOCKS)
    return model, keep, tiny_llama(context=32, dtype=dtype, num_hidden_layers=BLOCKS).requires_grad_(False)


def states_of(model, text):
    """After the embedding, after each block's attention and after each block, by a plain walk through the model."""
    inner, states = model.model, {}
    hidden = inner.embed_tokens(text)
    position = torch.arange(text.shape[1])[None]
    rotary = inner.rotary_emb(hidden, position)
    for number, layer in enumerate(inner.layers):
        states[number, "in"] = hidden
        attended = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)[0]
        states[number, "mid"] = hidden = hidden + attended
        states[number, "out"] = hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return states


def ends_of(scope):
    """The end of each window and its parameters, by their beginnings."""
    if scope == "sub_block":
        attention, mlp = ("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")
        return [
            (n, end, [f"model.layers.{n}.{p}." for p in own])
            for n in range(BLOCKS)
            for end, own in (("mid", attention), ("out", mlp))
        ]
    together = BLOCKS_OF[scope]
    return [
        (first + together - 1, "out", [f"model.layers.{n}." for n in range(first, first + together)])
        for first in range(0, BLOCKS, together)
    ]


def expected(model, dense, scope):
    """The loss, and the gradient of each parameter to the error of the window that it is in alone."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        targets = states_of(copy.deepcopy(dense).double(), TEXT)
    ends, losses, gradients = ends_of(scope), [], {}
    for number, end, own in ends:
        named = {name: p for name, p in model.named_parameters() if name.startswith(tuple(own))}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in named.values():
            parameter.requires_grad_()
        found, target = states_of(model, TEXT)[number, end], targets[number, end]
        sizes = target.norm(dim=-1)
        of_windows = ((found - target).square().sum(-1) / sizes).sum(-1) / sizes.sum(-1)
        error = of_windows.mean() / len(ends)
        gradients |= dict(zip(named, torch.autograd.grad(error, [*named.values()]), strict=True))
        losses.append(error.detach())
    return float(sum(losses)), gradients


@pytest.mark.parametrize("scope", BLOCKS_OF)
def test_each_window_learns_from_its_own_error_alone(scope):
    model, _, dense = models()
    loss, gradients = expected(model, dense, scope)
    objective = Reconstruction.of(model, dense, scope, 2, TEXT.shape[1])
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters() if ".layers." in name}
    named = {name: model.get_parameter(name) for name in found}
    with taking_gradients(named, lambda name, gradient: found[name].add_(gradient)):
        value, multiple = objective.differentiate(TEXT)
    assert (value, multiple) == (pytest.approx(loss, rel=1e-5), 1.0)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(found[name].double(), gradient, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_fall_zeros_stay_and_nothing_outside_the_blocks_moves(dtype):
    model, keep, dense = models(dtype)
    before = weights_of(model)
    tuner = Blocks(Adam(lr=3e-3)).begin(model, keep, 0)
    objective = Reconstruction.of(model, dense, "block", 3, TEXT.shape[1])
    losses = [tuner.step(objective, TEXT, number, 1.0).loss for number in range(6)]
    assert losses[-1] < 0.9 * losses[0]
    assert_zeros_exact(model, keep)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".layers." in name}


def test_a_dense_model_of_other_blocks_is_refused():
    model, _, _ = models()
    with pytest.raises(ValueError, match="another number of blocks"):
        Reconstruction.of(model, tiny_llama(context=32), "block", 2, TEXT.shape[1])


def test_a_dense_model_that_is_its_own_teacher_has_no_error():
    _, _, dense = models()
    objective = Reconstruction.of(dense, copy.deepcopy(dense), "pair", 2, TEXT.shape[1])
    with taking_gradients(dict(dense.named_parameters()), lambda name, gradient: None):
        assert objective.differentiate(TEXT)[0] == 0.0


def test_no_graph_reaches_from_one_window_into_the_next():
    model, _, dense = models()
    objective, seen = Reconstruction.of(model.requires_grad_(), dense, "block", 3, 24), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    objective.differentiate(TEXT)
    assert len(seen) >= BLOCKS
    assert not any(seen)
