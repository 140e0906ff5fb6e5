"""SparseGrad: dense models alone, and as much of a gradient as is told."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from pruned_llama import WINDOWS, Overflowing, assert_same_bits, pruned_llama, weights_of

from besa_exp.recovery.descent import Adam
from besa_exp.recovery.objective import NextToken
from besa_exp.recovery.sparsegrad import Rotated, SparseGrad, largest

TOLD = SparseGrad(Adam(lr=3e-3), share=0.05, gather=2)


def stepped(numbers, state=None):
    model, _ = pruned_llama(pruned=0)
    tuner = TOLD.begin(model, {}, 0)
    if state is not None:
        tuner.load(state)
    losses = [tuner.step(NextToken(model), WINDOWS[:2], number, 1.0).loss for number in numbers]
    return model, tuner, losses


def test_the_first_steps_look_and_the_others_lower_the_loss_of_the_named_linears_alone():
    before = weights_of(pruned_llama(pruned=0)[0])
    model, _, losses = stepped(range(2))
    assert losses[0] == losses[1]
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in before.items())
    model, tuner, losses = stepped(range(6))
    assert losses[-1] < losses[3] < losses[2] == losses[0]
    assert tuner.descent is not None
    for name, form in tuner.descent.forms.items():
        assert isinstance(form, Rotated)
        assert form.count == int(0.05 * model.get_parameter(name).numel())
    moved = {name for name, value in before.items() if not torch.equal(value, model.get_parameter(name))}
    assert moved == set(tuner.parameters)
    assert all(".mlp." in name for name in moved)


class Infinite(Overflowing):
    """A gradient that is not finite by itself."""

    def differentiate(self, windows):
        (self.inner.model(windows, use_cache=False).logits.sum() * torch.inf).backward()
        return 1.0, 1.0


@pytest.mark.parametrize("objective", [Overflowing, Infinite])
def test_gradients_that_are_not_finite_are_not_gathered(objective):
    model, tuner, _ = stepped([0])
    before = {name: value.clone() for name, value in tuner.state().items()}
    taken = tuner.step(objective(model, "loss"), WINDOWS[:2], 1, 1.0)
    assert not (math.isfinite(taken.loss) and math.isfinite(taken.gradient_norm or 0))  # so that the course ends
    assert all(torch.equal(value, before[name]) for name, value in tuner.state().items())


def test_the_weights_come_back_from_their_coordinates():
    model, tuner, _ = stepped(range(2))
    for name, form in tuner._descent().forms.items():
        weight = model.get_parameter(name).detach()
        form.write(back := torch.empty_like(weight))
        torch.testing.assert_close(back, weight, rtol=1e-4, atol=1e-5)


def test_bases_are_those_of_the_gradients_of_all_linears_of_a_kind_and_a_shape():
    """Of square ones too, which either side's basis would fit."""
    model, _ = pruned_llama(pruned=0)
    plain = copy.deepcopy(model).requires_grad_()
    NextToken(plain).differentiate(WINDOWS[:1])
    tuner = SparseGrad(gather=1, kinds=("_proj",)).begin(model, {}, 0)
    tuner.step(NextToken(model), WINDOWS[:1], 0, 1.0)
    forms = tuner._descent().forms
    gradients: dict[str, Any] = {name: plain.get_parameter(name).grad for name in forms}
    assert len({gradient.shape for gradient in gradients.values()}) > 2
    for name, form in forms.items():
        alike = [other for other in gradients.values() if other.shape == gradients[name].shape]
        assert isinstance(form, Rotated)
        for basis, products in ((form.P, [G @ G.T for G in alike]), (form.Q, [G.T @ G for G in alike])):
            energies = (basis.T @ sum(products) @ basis).double()
            bound = 1e-4 * float(energies.max())
            torch.testing.assert_close(energies, energies.diagonal().diag(), rtol=0, atol=bound)
            assert (energies.diagonal().diff() <= bound).all()


@pytest.mark.parametrize("at", [1, 4])
def test_a_tuner_goes_on_while_it_looks_and_later_with_the_same_bits(at):
    whole, _, _ = stepped(range(6))
    _, tuner, _ = stepped(range(at))
    model, _, _ = stepped(range(at, 6), {key: value.clone() for key, value in tuner.state().items()})
    assert_same_bits(whole, model)


def test_the_largest_by_size_stay_and_of_equals_the_first():
    gradient = torch.tensor([[1.0, -3.0, 2.0], [-2.0, 0.5, 2.0]])
    assert largest(gradient, 3).tolist() == [[0.0, -3.0, 2.0], [-2.0, 0.0, 0.0]]


@pytest.mark.parametrize("count", [1, 7, 23, 24])
def test_the_largest_are_the_first_of_a_stable_sort(count):
    draws = torch.Generator().manual_seed(count)
    for gradient in (torch.randint(-2, 3, (4, 6), generator=draws).float(), torch.randn(6, 4, generator=draws).T):
        flat = gradient.flatten()
        order = flat.abs().argsort(descending=True, stable=True)[:count]
        expected = torch.zeros_like(flat).scatter_(0, order, flat[order]).view_as(gradient)
        assert torch.equal(largest(gradient, count), expected)


def test_pruned_models_are_refused_with_the_reason():
    model, keep = pruned_llama()
    with pytest.raises(ValueError, match=r"none of the 50% zeros of this model would stay; use recovery=full or lora"):
        TOLD.begin(model, keep, 0)
    with pytest.raises(ValueError, match=r"recovery\.share"):
        SparseGrad(share=0.0)
