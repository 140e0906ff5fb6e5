"""Methods by gradients: their steps against plain ones, their zeros, their states, and what they hold."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from families import tiny
from pruned_llama import (
    WINDOWS,
    Overflowing,
    as_bytes,
    assert_same_bits,
    assert_zeros_exact,
    pruned_llama,
    three_alike,
    weights_of,
)

from besa_exp.recovery.descent import Adam
from besa_exp.recovery.full import Full, Kept, Norms, embeddings_of, norms_and_biases
from besa_exp.recovery.keep_bits import keep_of_zeros, parameters_of_linears
from besa_exp.recovery.lora import Factored, Lora
from besa_exp.recovery.objective import NextToken, mean_loss
from besa_exp.recovery.sketch import Sketch
from besa_exp.tensors.keep_bits import KeepBits

METHODS = {
    "full": Full(Adam(lr=1e-2, decay=0.1)),
    "full_blocks": Full(Adam(lr=1e-2), embeddings=False),
    "lora": Lora(Adam(lr=1e-2), rank=4),
    "lora_alone": Lora(Adam(lr=1e-2), rank=4, norms=False),
    "scale": Lora(Adam(lr=1e-2), rank=4, alpha=None),
    "norms": Norms(Adam(lr=1e-2)),
}


def steps(tuner, objective, numbers, scale=1.0):
    return [tuner.step(objective, WINDOWS[2 * n % 12 :][:2], n, scale) for n in numbers]


def plain_steps(model, keep, optimizer, numbers, clip):
    """Full tuning as it is usually written: dense gradients and moments, the mask after each step."""
    named = dict(model.named_parameters())
    for n in numbers:
        windows = WINDOWS[2 * n % 12 :][:2]
        logits = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten()).backward()
        for name, bits in keep.items():
            named[name].grad.mul_(bits.mask())
        torch.nn.utils.clip_grad_norm_(named.values(), clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, bits in keep.items():
                named[name].mul_(bits.mask())


def test_full_is_adamw_with_masked_gradients_on_dense_tensors():
    (model, keep), (plain, _) = pruned_llama(), pruned_llama()
    tuner = Full(Adam(lr=1e-2, decay=0.1, clip=0.5)).begin(model, keep, 0)
    steps(tuner, NextToken(model), range(4))
    plain.requires_grad_(True)
    groups = [
        {"params": [p for p in plain.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    plain_steps(plain, keep, torch.optim.AdamW(groups, lr=1e-2), range(4), 0.5)
    start = weights_of(pruned_llama()[0])
    for name, expected in plain.named_parameters():
        found = model.get_parameter(name)
        torch.testing.assert_close(
            found, expected.detach(), rtol=1e-4, atol=2e-5
        )  # gradients are summed in another order
        assert float((found - start[name]).abs().max()) > 1e-2


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("dtype", "pruned"), [(torch.float32, 2), (torch.bfloat16, 3)])
def test_zeros_stay_exact_and_n_of_m_and_the_loss_falls(name, dtype, pruned):
    model, keep = pruned_llama(pruned, dtype)
    tuner = METHODS[name].begin(model, keep, 0)
    first = steps(tuner, NextToken(model), [0])[0].loss
    last = steps(tuner, NextToken(model), [0] * 4)[-1].loss
    assert last < first
    assert_zeros_exact(model, keep)


@pytest.mark.parametrize("name", METHODS)
def test_beginning_changes_no_weight_but_by_the_rounding_of_a_product(name):
    model, keep = pruned_llama()
    before = weights_of(model)
    tuner = METHODS[name].begin(model, keep, 0)
    tuner.write()
    for parameter, weight in before.items():
        assert torch.equal(as_bytes(model.get_parameter(parameter)), as_bytes(weight)), parameter


@pytest.mark.parametrize("method", [*METHODS.values(), Sketch(Adam(lr=1e-3), bits=3)], ids=[*METHODS, "sketch"])
def test_a_tuner_that_goes_on_from_its_state_ends_with_the_same_bits(method):
    model, keep = pruned_llama()
    tuner = method.begin(model, keep, 0)
    steps(tuner, NextToken(model), range(3))
    state = {key: value.clone() for key, value in tuner.state().items()}
    steps(tuner, NextToken(model), range(3, 5))
    other, _ = pruned_llama()
    again = method.begin(other, keep, 0)
    again.load(state)
    steps(again, NextToken(other), range(3, 5))
    assert_same_bits(model, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tuner_on_a_gpu_goes_on_from_a_state_that_was_in_a_file():
    """The fused kernel refuses a count of steps that lies on the CPU."""
    model = pruned_llama()[0].cuda()  # type: ignore[call-arg]
    tuner = Full(Adam(lr=1e-2)).begin(model, keep_of_zeros(model), 0)
    steps(tuner, NextToken(model), [0])
    tuner.load({key: value.cpu() for key, value in tuner.state().items()})
    steps(tuner, NextToken(model), [1])


def gradients_of(tuner, objective, windows):
    """Those to what is trained, as the optimizer sees them, and what the step saw."""
    found = {}

    def keep(*args):
        found.update({name: leaf.grad.clone() for name, leaf in tuner.leaves.items()})

    hook = tuner.optimizer.register_step_pre_hook(keep)
    taken = tuner.step(objective, windows, 0, 1.0)
    hook.remove()
    return found, taken


def test_parts_of_a_batch_and_checkpointing_give_the_gradients_of_the_whole():
    found = []
    for micro_batch, checkpointing in ((4, False), (1, False), (4, True)):
        model, keep = pruned_llama()
        objective = NextToken(model, micro_batch=micro_batch, checkpointing=checkpointing)
        found.append(gradients_of(Full(Adam(lr=1e-2)).begin(model, keep, 0), objective, WINDOWS[:4])[0])
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def norm_of(gradients):
    return float(torch.cat([gradient.flatten().double() for gradient in gradients.values()]).norm())


def test_gradients_are_cut_to_the_norm_that_is_asked_for_and_the_norm_before_is_reported():
    def gradients(clip):
        model, keep = pruned_llama()
        tuner = Full(Adam(lr=1e-2, clip=clip)).begin(model, keep, 0)
        return gradients_of(tuner, NextToken(model), WINDOWS[:2])

    free, _ = gradients(None)
    norm = norm_of(free)
    for share in (0.5, 0.75, 1.25):
        found, taken = gradients(share * norm)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, free[name] * min(share, 1), rtol=1e-5, atol=0)
        assert taken.gradient_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("method", [Full(Adam(lr=1e-2, clip=None)), Norms(Adam(lr=1e-2, clip=None))])
def test_gradients_in_fp16_are_those_in_fp32_and_are_multiplied_on_their_way(method):
    (half, keep), (model, _) = pruned_llama(dtype=torch.float16), pruned_llama(dtype=torch.float16)
    model = model.float()
    found, expected = (
        gradients_of(method.begin(own, keep, 0), NextToken(own), WINDOWS[:2])[0] for own in (half, model)
    )
    assert norm_of({name: found[name] - expected[name] for name in found}) < 0.02 * norm_of(expected)
    half.requires_grad_()
    loss, multiple = NextToken(half).differentiate(WINDOWS[:2])
    assert (loss, multiple) == (pytest.approx(mean_loss(model, WINDOWS[:2], 2), rel=1e-2), 32)  # 48 tokens


def test_a_step_is_that_of_the_windows_of_all_processes():
    found = []
    for processes, windows in ((nullcontext, WINDOWS[:2]), (three_alike, WINDOWS[:2].repeat_interleave(3, dim=0))):
        model, keep = pruned_llama()
        tuner = Full(Adam(lr=1e-2, clip=None)).begin(model, keep, 0)
        with processes():
            taken = tuner.step(NextToken(model), windows, 0, 1.0)
            found.append([taken.loss, taken.gradient_norm, mean_loss(model, windows, 2)])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(("pruned", "expected"), [(2, 10.125), (3, 6.125)])
def test_full_holds_the_bytes_a_parameter_that_are_told(pruned, expected):
    """2 for W in bf16, 1/8 for the bits, 12 for a kept weight, and 4 for its gradient during a step."""
    model, keep = pruned_llama(pruned, torch.bfloat16)
    tuner = Full(Adam(lr=1e-2)).begin(model, keep, 0)
    dense = []
    tuner.optimizer.register_step_pre_hook(lambda *args: dense.extend(p.grad for p in model.parameters()))
    gradients, _ = gradients_of(tuner, NextToken(model), WINDOWS[:2])
    assert dense == [None] * len(list(model.parameters()))
    held = {name: value for name, value in tuner.state().items() if not name.endswith("/step")}
    count = sum(gradients[name].nbytes for name in gradients if name.rpartition("/")[0] in keep)
    count += sum(value.nbytes for name, value in held.items() if any(name.startswith(f"{own}/") for own in keep))
    count += sum(bits.bits.nbytes + model.get_parameter(name).nbytes for name, bits in keep.items())
    assert count / sum(bits.numel for bits in keep.values()) == pytest.approx(expected)


def test_a_kept_weight_that_passes_through_zero_is_still_tuned():
    keep = KeepBits.of(torch.tensor([[True, False, True]]))
    parameter = torch.tensor([[0.0, 0.0, 1.0]])
    form = Kept.of(parameter, keep)
    assert form.gradients(torch.tensor([[3.0, 5.0, 7.0]]))["values"].tolist() == [3.0, 7.0]


def test_kept_values_below_the_dtypes_smallest_number_are_written_as_plus_zero():
    keep = KeepBits.of(torch.tensor([[True, False]]))
    parameter = torch.ones(1, 2, dtype=torch.float16)
    keep.clear_(parameter)
    Kept(torch.tensor([-1e-9]), keep).write(parameter)
    assert not torch.signbit(parameter).any()


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(fault):
    model, keep = pruned_llama()
    tuner = Full(Adam(lr=1e-2)).begin(model, keep, 0)
    steps(tuner, NextToken(model), [0])
    state, before = {key: value.clone() for key, value in tuner.state().items()}, weights_of(model)
    (taken,) = steps(tuner, Overflowing(model, fault), [1])
    assert taken.gradient_norm is not None
    assert math.isfinite(taken.loss) == (fault != "loss")
    assert math.isfinite(taken.gradient_norm) == (fault != "gradient")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(torch.equal(value, state[key]) for key, value in tuner.state().items())


def test_norms_alone_leave_every_linear_as_it_is():
    model, keep = pruned_llama()
    before = weights_of(model)
    steps(Norms(Adam(lr=1e-2)).begin(model, keep, 0), NextToken(model), range(2))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.dim() == 1}


@pytest.mark.parametrize("alpha", [6.4, None])
def test_a_dense_linear_is_what_it_was_and_the_product_of_factors_that_are_no_thicker_than_it(alpha):
    model, _ = pruned_llama(pruned=0)
    before = weights_of(model)
    tuner = Lora(Adam(lr=1e-2), rank=100, alpha=alpha).begin(model, {}, 0)
    steps(tuner, NextToken(model), range(3))
    for name, form in tuner.forms.items():
        if isinstance(form, Factored):
            assert form.A.shape[0] == form.B.shape[1] == min(before[name].shape)
            expected = before[name] * (form.B @ form.A) if alpha is None else before[name] + 0.064 * form.B @ form.A
            torch.testing.assert_close(model.get_parameter(name).detach(), expected)


def test_norms_and_biases_are_all_that_has_one_axis():
    model = tiny("opt")
    found = norms_and_biases(model)
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.dim() == 1}
    assert any(name.endswith("q_proj.bias") for name in found)


def test_embeddings_and_head_alone_are_left_out():
    assert embeddings_of(pruned_llama()[0]) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_published_beginning_of_scale_stays_of_rank_one_and_ours_does_not():
    """All entries 1 / sqrt(r): the columns of B are equal and get equal gradients."""
    model, keep = pruned_llama()
    tuner = Lora(Adam(lr=1e-2), rank=4, alpha=None).begin(model, keep, 0)
    steps(tuner, NextToken(model), range(3))
    name = next(iter(parameters_of_linears(model)))
    form = tuner.forms[name]
    assert isinstance(form, Factored)
    assert torch.linalg.matrix_rank(form.B @ form.A) == 4
    A, B = torch.full((4, 64), 0.5), torch.full((64, 4), 0.5)
    gradients = Factored(form.base, A, B, form.keep).gradients(torch.randn(64, 64))
    assert torch.equal(gradients["B"], gradients["B"][:, :1].expand(-1, 4))


def test_lora_holds_no_second_copy_of_all_weights():
    model, keep = pruned_llama(dtype=torch.bfloat16)
    forms = [form for form in Lora(rank=4).begin(model, keep, 0).forms.values() if isinstance(form, Factored)]
    assert sum(form.base.nbytes for form in forms) == 2 * sum(bits.count for bits in keep.values())


@pytest.mark.parametrize(("alpha", "scaling", "variance"), [(8.0, 2.0, 1 / 64), (None, None, 1 / 4)])
def test_factors_are_drawn_by_seed_and_linear_with_the_same_variance_whatever_the_rank(alpha, scaling, variance):
    model, keep = pruned_llama()
    tuner, other = (Lora(rank=4, alpha=alpha).begin(model, keep, seed) for seed in (1, 2))
    first, second = (f"model.layers.{number}.self_attn.q_proj.weight" for number in (0, 1))
    forms = tuner.forms[first], tuner.forms[second], other.forms[first]
    assert {form.scaling for form in forms if isinstance(form, Factored)} == {scaling}
    drawn = [form.trained["A"][1:] for form in forms]
    for one in drawn:
        assert float(one.var()) == pytest.approx(variance, rel=0.25)
    assert not any(torch.equal(drawn[0], another) for another in drawn[1:])


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"recovery\.lr"):
        Adam(lr=0.0)
    with pytest.raises(ValueError, match=r"recovery\.clip"):
        Adam(lr=1.0, clip=0.0)
    with pytest.raises(ValueError, match=r"recovery\.rank"):
        Lora(rank=0)
