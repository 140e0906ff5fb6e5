"""MeZO: nothing drifts, zeros stay, all follows from keys and two numbers a step, and memory is that of inference."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from pruned_llama import (
    EXAMPLES,
    WINDOWS,
    as_bytes,
    assert_same_bits,
    assert_zeros_exact,
    pruned_llama,
    three_alike,
    weights_of,
)

from besa_exp.recovery.mezo import BlockFiles, Mezo, normal, rounded_at_random
from besa_exp.recovery.objective import NextToken, mean_loss, next_token_losses, option_losses
from besa_exp.recovery.saved_states import SavedStates
from besa_exp.recovery.schedule import Schedule, key_of
from besa_exp.recovery.tuning import Parts, Plan, tune
from besa_exp.tensors.keep_bits import kept_values

TOLD = Mezo(lr=1e-4, together=2)


def begun(dtype=torch.float32, told=TOLD, seed=0, **changes):
    model, keep = pruned_llama(dtype=dtype, **changes)
    return model, keep, told.begin(model, keep, seed)


@pytest.mark.parametrize(
    ("tied", "windows", "losses"),
    [(False, WINDOWS[:3], next_token_losses), (True, WINDOWS[:3], next_token_losses), (False, EXAMPLES, option_losses)],
)
def test_both_losses_are_those_of_the_whole_model_with_perturbed_weights(tied, windows, losses):
    model, keep, tuner = begun(tie_word_embeddings=tied)
    before = weights_of(model)
    found = tuner.losses(NextToken(model, losses=losses), windows, 7)
    for sign, loss in zip((1, -1), found, strict=True):
        other, _ = pruned_llama(tie_word_embeddings=tied)
        for name, parameter in other.named_parameters():
            count = keep[name].count if name in keep else parameter.numel()
            z = tuner.noise(7, name, count)
            if name in keep:
                parameter[keep[name].mask()] += sign * 1e-3 * z
            else:
                parameter.add_(sign * 1e-3 * z.view(parameter.shape))
        assert loss == pytest.approx(mean_loss(other, windows, 3, losses), rel=2e-6)
    for name, value in before.items():
        assert torch.equal(as_bytes(value), as_bytes(model.get_parameter(name))), f"{name} drifted"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_along_z_by_the_projected_gradient_and_rounded_at_random_in_bf16(dtype):
    model, keep, tuner = begun(dtype)
    for number, scale in enumerate((0.5, 0.25)):
        before = weights_of(model)
        plus, minus = tuner.losses(NextToken(model), WINDOWS[:2], number)
        taken = tuner.step(NextToken(model), WINDOWS[:2], number, scale)
        assert taken.loss == (plus + minus) / 2
        projected, rate = (plus - minus) / 2e-3, scale * 1e-4
        state = tuner.state()
        assert (state["projected"][number], state["rates"][number]) == (pytest.approx(projected), rate)
        for name, parameter in model.named_parameters():
            kept, own = (kept_values(value.detach(), keep.get(name)) for value in (before[name], parameter))
            moved = kept.float() - rate * projected * tuner.noise(number, name, len(kept))
            if dtype == torch.bfloat16:
                moved = rounded_at_random(moved, key_of("rounding", 0, number, name))
            assert torch.equal(own.float(), moved) or torch.allclose(own, moved, rtol=0, atol=1e-7), name


def test_a_step_that_is_not_finite_changes_nothing():
    model, _, tuner = begun()
    model.lm_head.weight.fill_(torch.inf)
    before = weights_of(model)
    taken = tuner.step(NextToken(model), WINDOWS[:2], 0, 1.0)
    assert taken.loss != taken.loss
    assert not len(tuner.state()["projected"])
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in before.items())


def test_losses_are_those_of_the_windows_of_all_processes():
    model, _, tuner = begun()
    expected = tuner.losses(NextToken(model), WINDOWS[:2], 0)
    with three_alike():
        found = tuner.losses(NextToken(model), WINDOWS[:2].repeat_interleave(3, dim=0), 0)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_exact_and_kept_weights_move(dtype):
    model, keep, tuner = begun(dtype)
    before = weights_of(model)
    for number in range(3):
        tuner.step(NextToken(model), WINDOWS[:2], number, 1.0)
    assert_zeros_exact(model, keep)
    for name, bits in keep.items():
        assert int((model.get_parameter(name) != before[name]).sum()) > 0.01 * bits.count


def test_the_projected_gradient_is_the_directional_derivative():
    model, keep, tuner = begun(torch.float64, Mezo(lr=1e-4, eps=1e-4, together=4))
    plus, minus = tuner.losses(NextToken(model), WINDOWS[:2], 0)
    model.requires_grad_(True)
    logits = model(WINDOWS[:2], use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, WINDOWS[:2, 1:].flatten()).backward()
    expected = 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradient = keep[name].gather(parameter.grad) if name in keep else parameter.grad.flatten()
        expected += float(gradient @ tuner.noise(0, name, len(gradient)).double())
    assert (plus - minus) / 2e-4 == pytest.approx(expected, rel=2e-2)  # losses of each window are summed in fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_numbers_is_replayed_bit_for_bit(dtype):
    model, _, tuner = begun(dtype)
    for number in range(4):
        tuner.step(NextToken(model), WINDOWS[number : number + 2], number, 1 / (number + 1))
    state = tuner.state()
    assert sum(value.nbytes for value in state.values()) == 4 * 16
    other, _, again = begun(dtype)
    again.load(state)
    assert_same_bits(model, other)


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    def run(folder, until=None):
        model, keep = pruned_llama()

        def on_point(point):
            if point.step == until:
                raise KeyboardInterrupt

        states = SavedStates(folder, {}) if folder else None
        plan = Plan(Schedule(4), 2, judge_every=2)
        tune(model, keep, Mezo(lr=1e-3), NextToken(model), Parts(WINDOWS[:8], WINDOWS[:8]), plan, states, on_point)
        return model

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, until=2)
    model, whole = run(tmp_path), run(None)
    assert_same_bits(whole, model)


def test_z_follows_from_seed_step_and_name_alone():
    (_, _, one), (_, _, same), (_, _, other) = begun(), begun(), begun(seed=1)
    z = one.noise(3, "model.norm.weight", 64)
    one.noise(0, "lm_head.weight", 9)
    assert torch.equal(same.noise(3, "model.norm.weight", 64), z)
    for different in (one.noise(4, "model.norm.weight", 64), one.noise(3, "lm_head.weight", 64)):
        assert not torch.equal(different, z)
    assert not torch.equal(other.noise(3, "model.norm.weight", 64), z)
    assert abs(float(normal(100000, 1).mean())) < 0.02
    assert float(normal(100000, 1).std()) == pytest.approx(1, abs=0.02)


def test_rounding_at_random_has_the_right_mean_and_keeps_what_bf16_holds():
    held = torch.randn(1000).bfloat16().float()
    assert torch.equal(rounded_at_random(held, 1), held)
    value = torch.full((40000,), -1.0) - 2**-9  # a quarter of the way from -1 to the next, -1 - 2^-7
    rounded = rounded_at_random(value, 2)
    assert set(rounded.tolist()) == {-1.0, -1.0 - 2**-7}
    assert float(rounded.double().mean()) == pytest.approx(float(value[0]), abs=1e-4)


def test_steps_below_half_a_unit_of_bf16_add_up():
    """1,000 steps of a hundredth of a unit are ten units; rounded to nearest they would be none."""
    weight = torch.ones(256)
    for number in range(1000):
        weight = rounded_at_random(weight + 0.01 * 2**-7, number).bfloat16().float()
    assert float(weight.mean()) == pytest.approx(1 + 10 * 2**-7, abs=2**-7)


def test_perturbed_weights_are_at_most_those_of_one_block_and_no_z_is_held_beside_them(monkeypatch):
    """Counted: what the perturbed weights take at any moment, and which z are there while a layer computes."""
    model, _, tuner = begun(initializer_range=0.02)
    blocks = [sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers]
    outside = model.lm_head.weight.nbytes + model.model.norm.weight.nbytes
    largest, drawn, held = [], [], []
    sides, noise = type(tuner)._sides, tuner.noise

    def counted(self, parameters, *args):
        largest.append(sum(parameter.nbytes for parameter in parameters.values()))
        return sides(self, parameters, *args)

    def remembered(*args):
        z = noise(*args)
        drawn.append(weakref.ref(z))
        return z

    monkeypatch.setattr(type(tuner), "_sides", counted)
    tuner.noise = remembered  # type: ignore[assignment]
    for module in (*model.model.layers, model.lm_head):
        module.register_forward_pre_hook(lambda *_: held.append(sum(z() is not None for z in drawn)))
    tuner.losses(NextToken(model), WINDOWS[:2], 0)
    assert max(largest) <= max(*blocks, outside)
    assert len(largest) == 1 + 2 + 1
    assert len(held) >= 2 * (2 + 1)
    assert drawn
    assert not any(held)


def test_z_is_drawn_once_for_both_losses_and_once_for_the_step():
    """On the CPU, which takes longer over it than a GPU over all else."""
    _, _, tuner = begun()
    noise, drawn = tuner.noise, []
    tuner.noise = lambda step, name, count: drawn.append(name) or noise(step, name, count)
    tuner.step(NextToken(tuner.model), WINDOWS[:2], 0, 1.0)
    assert sorted(drawn) == sorted([*tuner.parameters] * 2 + ["model.norm.weight"])  # at the entry and at the end


def streamed(folder):
    """A tuner whose blocks come from their pruned weights, and nothing of them is in memory."""
    model, keep = pruned_llama(dtype=torch.bfloat16)
    pruned = weights_of(model)

    def load(name, module):
        module.load_state_dict({own: pruned[f"{name}.{own}"].clone() for own in module.state_dict()}, assign=True)
        module.requires_grad_(False)

    def release(module):
        module.to("meta")

    for layer in model.model.layers:
        release(layer)
    return model, replace(TOLD, files=BlockFiles(load, release, folder)).begin(model, keep, 0)


def test_a_streamed_model_that_goes_on_has_the_bits_of_one_in_memory(tmp_path):
    whole, _, expected = begun(torch.bfloat16)
    losses = [expected.step(NextToken(whole), WINDOWS[:2], number, 1 / (number + 1)).loss for number in range(4)]
    model, tuner = streamed(tmp_path / "blocks")
    found = [tuner.step(NextToken(model), WINDOWS[:2], number, 1 / (number + 1)).loss for number in range(2)]
    model, again = streamed(tmp_path / "blocks")
    again.load(tuner.state())
    found += [again.step(NextToken(model), WINDOWS[:2], number, 1 / (number + 1)).loss for number in (2, 3)]
    assert found == losses
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    with again.ready():
        assert mean_loss(model, WINDOWS, 4) == mean_loss(whole, WINDOWS, 4)
    assert set(again.done.values()) == {4}
    for name, parameter in again.parameters.items():
        assert torch.equal(as_bytes(parameter), as_bytes(whole.get_parameter(name))), name


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"recovery\.eps=0"):
        Mezo(eps=0.0)
