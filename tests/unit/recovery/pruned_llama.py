"""A tiny Llama with zeros, and windows of tokens: what the methods of recovery are tried on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_llama import tiny_llama
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from besa_exp.recovery.keep_bits import keep_of_zeros, parameters_of_linears
from besa_exp.recovery.objective import NextToken

WINDOWS = torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(3))
LENGTHS, OWN = [(9, 20), (12, 3), (7, 7)], [(2, 5), (1, 2), (3, 3)]  # of options of examples, and what they add
EXAMPLES = torch.zeros(3, 2, 24, dtype=torch.int64)
for _example, (_lengths, _owns) in enumerate(zip(LENGTHS, OWN, strict=True)):
    for _option, (_length, _own) in enumerate(zip(_lengths, _owns, strict=True)):
        EXAMPLES[_example, _option, :_length] = WINDOWS[2 * _example + _option, :_length]
        EXAMPLES[_example, _option, _length - _own : _length] = ~WINDOWS[_example, :_own]


def pruned_llama(pruned=2, dtype=torch.float32, seed=0, **changes):
    """Of every 4 inputs in a row the `pruned` smallest are 0, so that it is N:M; and what is kept."""
    model = tiny_llama(context=32, seed=seed, dtype=dtype, **changes).requires_grad_(False)
    for parameter in parameters_of_linears(model).values():
        groups = parameter.view(*parameter.shape[:-1], -1, 4)
        groups.scatter_(-1, groups.abs().argsort(dim=-1)[..., :pruned], 0)
    return model, keep_of_zeros(model)


class Overflowing:
    """The next token's loss, where the loss or else the gradient alone is not finite."""

    def __init__(self, model, fault):
        self.inner, self.fault = NextToken(model), fault

    def differentiate(self, windows):
        loss, _ = self.inner.differentiate(windows)
        return (math.nan, 1.0) if self.fault == "loss" else (loss, 0.0)  # the gradient is divided by what comes second

    def of_logits(self, logits, windows):
        return self.inner.of_logits(logits, windows)


def assert_zeros_exact(model, keep):
    """Pruned places hold +0.0, bit for bit, and are as many as they were."""
    assert keep
    for name, bits in keep.items():
        pruned = model.get_parameter(name).detach()[~bits.mask()]
        as_integers = pruned.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[pruned.element_size()])
        assert as_integers.numel() == bits.numel - bits.count
        assert not as_integers.any(), name
        kept_of_four = (model.get_parameter(name).detach() != 0).view(-1, 4).sum(dim=1)
        assert int(kept_of_four.max()) <= int(bits.mask().view(-1, 4).sum(dim=1).max())


def assert_same_bits(model, other):
    """All parameters of the two models."""
    for name, parameter in model.named_parameters():
        assert torch.equal(as_bytes(parameter), as_bytes(other.get_parameter(name))), name


def weights_of(model):
    """A copy of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def as_bytes(tensor):
    """The bits of a tensor."""
    return tensor.detach().contiguous().view(torch.uint8)


@contextmanager
def three_alike() -> Iterator[None]:
    """This process is the first of three that own the same, where each window comes three times: what they have in sum
    is three times what it has."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda own: own.mul_(3))
        yield
    dist.destroy_process_group()
