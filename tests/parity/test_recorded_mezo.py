"""MeZO against the recorded run of its authors' trainer, given the draws of its seeds."""

from __future__ import annotations

import pytest
import torch
from recorded_llama import recorded, recorded_llama

from besa_exp.recovery.mezo import Mezo
from besa_exp.recovery.objective import NextToken
from besa_exp.tensors.keep_bits import KeepBits

# The order in which the transformers of that time registered a block's parameters, on which the draws depend.
OF_A_BLOCK = [f"self_attn.{name}_proj" for name in "qkvo"] + ["mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"]
OF_A_BLOCK += ["input_layernorm", "post_attention_layernorm"]
ORDER = ["model.embed_tokens", *(f"model.layers.{n}.{name}" for n in range(2) for name in OF_A_BLOCK)]
ORDER = [f"{name}.weight" for name in [*ORDER, "model.norm", "lm_head"]]
RUNS = {"fp32": torch.float32, "fp64": torch.float64, "fp32_wd": torch.float32}


@pytest.fixture(scope="module")
def golden(shared_dir):
    return recorded(shared_dir, "mezo")


def draws_of(model, seed, dtype):
    """z of every parameter as the trainer drew them, from one seed in the order of parameters."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {name: torch.randn(shapes[name], generator=generator, dtype=dtype) for name in ORDER}


def tuner_of(model, steps, dtype, decay=0.0):
    tuner = Mezo(lr=1e-3, eps=1e-3, decay=decay, together=4).begin(model, {}, 0)
    draws = [draws_of(model, step["seed"], dtype) for step in steps]
    tuner.noise = lambda step, name, count: draws[step][name].flatten()
    return tuner


def drift(tuner, number):
    """What the trainer leaves of its three perturbations, +1, -2 and +1 times eps z."""
    for name, parameter in tuner.parameters.items():
        z = tuner.noise(number, name, parameter.numel()).view(parameter.shape)
        for factor in (1, -2, 1):
            parameter.add_(factor * z * 1e-3)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("drifting", [True, False])
def test_with_the_recorded_gradients_the_weights_are_the_recorded_ones(golden, shared_dir, run, drifting):
    """Bit for bit where the trainer's drift is added, and as near as that drift without it. A processor that does not
    multiply and add in one rounding, as the recording one did, is as near as its own roundings."""
    same_roundings = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    tensors, told = golden
    model, _ = recorded_llama(shared_dir, RUNS[run])
    tuner = tuner_of(model, told[run]["steps"], RUNS[run], 0.1 if run == "fp32_wd" else 0.0)
    for number, step in enumerate(told[run]["steps"]):
        if drifting:
            drift(tuner, number)
        tuner.update(number, step["projected_grad"], 1e-3)
    for name, parameter in model.named_parameters():
        if run == "fp32_wd" and name == "model.norm.weight":  # decayed there, by an oversight in a list of names
            continue
        exact = drifting and same_roundings
        near = 1e-12 if exact else 2e-8
        assert float(parameter.double().norm()) == pytest.approx(told[run]["norms"][name], rel=near)
        assert float(parameter.double().sum()) == pytest.approx(told[run]["sums"][name], abs=1e-10 if exact else 1e-4)
        if f"{run}.after.{name}" in tensors:
            expected = tensors[f"{run}.after.{name}"]
            if exact:
                assert torch.equal(parameter, expected)
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=4 * 1.2e-7)


@pytest.mark.parametrize("run", ["fp32", "fp64"])
def test_losses_and_projected_gradients_are_the_recorded_ones(golden, shared_dir, run):
    _, told = golden
    model, windows = recorded_llama(shared_dir, RUNS[run])
    tuner = tuner_of(model, told[run]["steps"], RUNS[run])
    for number, step in enumerate(told[run]["steps"]):
        plus, minus = tuner.losses(NextToken(model), windows[step["rows"]], number)
        assert plus == pytest.approx(step["loss_plus"], abs=3e-6)
        assert minus == pytest.approx(step["loss_minus"], abs=3e-6)
        assert (plus - minus) / 2e-3 == pytest.approx(step["projected_grad"], abs=2e-3)
        tuner.update(number, step["projected_grad"], 1e-3)


def test_the_recorded_run_destroyed_every_zero_and_this_one_keeps_all(golden, shared_dir):
    _, told = golden
    assert told["fp32_pruned50"]["zeros"] == 0
    model, windows = recorded_llama(shared_dir)
    keep = {}
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter[parameter.abs() <= parameter.abs().flatten().kthvalue(parameter.numel() // 2).values] = 0
            keep[name] = KeepBits.of(parameter != 0)
    assert sum(bits.numel - bits.count for bits in keep.values()) == 49408
    tuner = Mezo(lr=1e-3).begin(model, keep, 0)
    for number in range(4):
        tuner.step(NextToken(model), windows[:4], number, 1.0)
    assert sum(int((model.get_parameter(name) == 0).sum()) for name in keep) == 49408
