"""Keep bits: the mask of any tensor, its places, and how it is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruned_llama import pruned_llama
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, GPT2LMHeadModel

from besa_exp.blocks.block import discover_blocks
from besa_exp.blocks.linears import find_linears
from besa_exp.recovery.keep_bits import (
    keep_of_masks,
    keep_of_zeros,
    masks_of_keep,
    parameters_of_linears,
    sparsity_of,
)
from besa_exp.tensors.keep_bits import KeepBits, packed_bits, packed_on_device, places_on_device, unpacked_on_device


def random_mask(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.4


@pytest.mark.parametrize("shape", [(3, 5), (8, 16), (2, 3, 7), (1, 1)])
def test_bits_are_the_mask_whatever_the_size_and_lie_as_in_masks_files(shape):
    mask = random_mask(*shape)
    bits = KeepBits.of(mask)
    assert torch.equal(bits.mask(), mask)
    assert (bits.count, bits.numel) == (int(mask.sum()), mask.numel())
    assert bits.bits.tolist() == np.packbits(mask.numpy()).tolist()
    assert torch.equal(bits.places(), mask.flatten().nonzero()[:, 0])


def test_scattering_by_the_mask_as_on_a_gpu_gives_the_same_weights():
    mask = random_mask(5, 7)
    bits, values = KeepBits.of(mask), torch.arange(1.0, 1 + int(mask.sum()))
    scattered, masked = torch.zeros(5, 7), torch.zeros(5, 7)
    bits.scatter_(values, scattered)
    assert torch.equal(masked.masked_scatter_(mask, values), scattered)
    assert torch.equal(bits.gather(scattered), values)


class WithoutNonzeroStatic(TorchFunctionMode):
    """As torch 2.6 answers for a tensor on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nonzero_static:
            raise NotImplementedError("Could not run 'aten::nonzero_static' with arguments from the 'CUDA' backend.")
        return func(*args, **(kwargs or {}))


def test_unpacking_by_shifts_as_on_a_gpu_gives_the_same_places():
    mask = random_mask(5, 7)
    bits = KeepBits.of(mask)
    assert torch.equal(unpacked_on_device(bits.bits, bits.shape), mask)
    assert torch.equal(places_on_device(mask.flatten(), bits.count), bits.places())
    with WithoutNonzeroStatic():
        assert torch.equal(places_on_device(mask.flatten(), bits.count), bits.places())


def test_scattering_what_was_gathered_changes_nothing_and_leaves_other_places():
    mask = random_mask(6, 9)
    bits, dense = KeepBits.of(mask), torch.randn(6, 9)
    there = torch.full_like(dense, 7)
    bits.scatter_(bits.gather(dense), there)
    assert torch.equal(there, torch.where(mask, dense, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_negative_zero_is_written_even_where_a_value_underflows_to_one(dtype):
    bits, dense = KeepBits.of(torch.ones(2, 3, dtype=torch.bool)), torch.ones(2, 3, dtype=dtype)
    bits.scatter_(torch.tensor([-0.0, -1e-46, -1.0, -1e-44, 0.0, 2.0]), dense)
    assert not torch.signbit(dense[dense == 0]).any()
    assert dense[0, 2] == -1


def test_clearing_turns_negative_zeros_and_nan_of_pruned_places_into_zeros():
    mask = random_mask(4, 4)
    dense = torch.where(mask, 1.0, -0.0)
    dense[~mask] = torch.where(torch.arange(int((~mask).sum())) % 2 == 0, -0.0, torch.nan)
    KeepBits.of(mask).clear_(dense)
    assert not torch.signbit(dense).any()
    assert torch.equal(dense, mask.float())


def test_zeros_of_a_pruned_model_are_its_mask_and_dense_tensors_have_none():
    model, keep = pruned_llama()
    assert set(keep) == set(parameters_of_linears(model))
    assert sparsity_of(model, keep) == 0.5
    for name, bits in keep.items():
        assert torch.equal(bits.mask(), model.get_parameter(name) != 0)
    name, bits = next(iter(keep.items()))
    weights = sum(other.numel for other in keep.values())
    assert sparsity_of(model, {name: bits}) == bits.numel / 2 / weights  # the others are dense
    dense, _ = pruned_llama(pruned=0)
    assert keep_of_zeros(dense) == {}


def test_masks_of_linears_become_bits_of_parameters_as_they_are_stored():
    """GPT-2 keeps its weights [in, out]; the mask of a linear is [out, in]."""
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(config)
    mask = random_mask(48, 16)
    (bits,) = keep_of_masks(model, {"transformer.h.0.attn.c_attn.weight": mask}).values()
    assert torch.equal(bits.mask(), mask.T)


def test_masks_that_fit_nothing_are_refused():
    model, keep = pruned_llama()
    name = next(iter(keep))
    with pytest.raises(ValueError, match=r"fit no linear.*give the masks of the run"):
        keep_of_masks(model, {"model.layers.9.mlp.up_proj.weight": random_mask(4, 4)})
    with pytest.raises(ValueError, match=r"has the shape \[4, 4\]"):
        keep_of_masks(model, {name: random_mask(4, 4)})


def test_a_mask_of_a_model_is_the_same_from_zeros_and_from_a_masks_file():
    model, keep = pruned_llama()
    masks = {name: bits.mask() for name, bits in keep.items()}
    again = keep_of_masks(model, masks)
    assert again.keys() == keep.keys()
    assert all(torch.equal(again[name].bits, bits.bits) for name, bits in keep.items())
    path, (module, _) = discover_blocks(model)
    dense = f"{path}.0.mlp.up_proj.weight"
    written = masks_of_keep(
        f"{path}.0", find_linears(module), {name: own for name, own in keep.items() if name != dense}
    )
    assert written.pop(dense).all()
    assert all(torch.equal(mask, masks[name]) for name, mask in written.items())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 172), (16, 64)])
def test_a_gpu_packs_masks_into_the_bits_that_a_cpu_does(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(packed_on_device(mask), packed_bits(mask))
