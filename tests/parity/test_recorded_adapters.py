"""Masked LoRA and multiplied LoRA against the recorded layers of PERP."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from besa_exp.recovery.lora import Factored
from besa_exp.tensors.keep_bits import KeepBits


@pytest.fixture(scope="module")
def golden(shared_dir):
    file = shared_dir / "golden" / "tuning" / "masked_adapters.safetensors"
    if not file.is_file():
        pytest.skip(f"{file} is not there: it holds the recorded layers")
    return load_file(file)


def form_of(name, golden):
    keep = KeepBits.of(golden["weight"] != 0)
    base = keep.gather(golden["weight"])
    if name == "mask_lora":
        return Factored(base, golden["lora_A"].clone(), golden["lora_B"].clone(), keep, 2.0)
    return Factored(base, golden["scale_lora.A_init"].clone(), golden["scale_lora.B_init"].clone(), keep)


@pytest.mark.parametrize("name", ["mask_lora", "scale_lora"])
def test_output_gradients_and_merged_weight_are_the_recorded_ones(golden, name):
    form = form_of(name, golden)
    weight = torch.zeros_like(golden["weight"])
    form.write(weight)
    weight.requires_grad_()
    output = golden["x"] @ weight.T
    torch.testing.assert_close(output.detach(), golden[f"{name}.y"], rtol=0, atol=2e-6)
    (output - golden["y"]).square().mean().backward()
    assert weight.grad is not None
    gradients = form.gradients(weight.grad)
    for key in "AB":
        torch.testing.assert_close(gradients[key], golden[f"{name}.grad_{key}"], rtol=0, atol=1e-6)
        form.trained[key].sub_(gradients[key], alpha=0.1)
    merged = torch.zeros_like(golden["weight"])
    form.write(merged)
    torch.testing.assert_close(merged, golden[f"{name}.merged"], rtol=0, atol=1e-6)
    assert int((merged == 0).sum()) == 1536
    assert not torch.signbit(merged[golden["weight"] == 0]).any()
