"""Which weights of a tensor are kept, one bit a weight, and the way between a tensor and the vector of its kept values.

The mask is stored, never read back as W != 0: a kept weight may pass through 0 while it is tuned, or underflow to it
in bf16, and would be lost to tuning from then on. Bits lie as masks files hold them: row-major, highest
bit first, 1 = kept. What is gathered and scattered are values at integer places, in rising order. On a CPU that is
eight times as fast as a boolean mask (2 against 17 ns a weight for a gather, one thread), and making the places of the
bits takes half of it, so that they need not be held.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped, UInt8
from torch import Tensor, nn


@dataclass(frozen=True)
class KeepBits:
    """The keep mask of one tensor of `shape`; `count` weights are kept."""

    bits: UInt8[Tensor, " bytes"]
    shape: torch.Size
    count: int

    @staticmethod
    def of(keep_mask: Bool[Tensor, "*shape"]) -> KeepBits:
        """The bits of a keep mask, on its device."""
        return KeepBits(packed_bits(keep_mask), keep_mask.shape, int(keep_mask.sum()))

    @staticmethod
    def packed(bits: UInt8[Tensor, " bytes"], shape: torch.Size) -> KeepBits:
        """From bits as they lie; those after the last weight are 0."""
        return KeepBits(bits, shape, int(np.unpackbits(bits.cpu().numpy()).sum(dtype=np.int64)))

    def to(self, device: torch.device) -> KeepBits:
        return replace(self, bits=self.bits.to(device))

    @property
    def numel(self) -> int:
        return self.shape.numel()

    def mask(self) -> Bool[Tensor, "*shape"]:
        return unpacked(self.bits, self.shape)

    def places(self) -> Int[Tensor, " kept"]:
        """The flat positions of the kept weights, in rising order."""
        if self.bits.device.type == "cpu":
            return torch.from_numpy(np.flatnonzero(self.mask().numpy()))
        return places_on_device(self.mask().flatten(), self.count)

    def gather(self, dense: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, " kept"]:
        """The values at the kept places, in the tensor's dtype."""
        return dense.reshape(-1).index_select(0, self.places())

    def scatter_(self, values: Shaped[Tensor, " kept"], dense: Shaped[Tensor, "*shape"]) -> None:
        """Write the values into the kept places of `dense`; the others stay as they are. No -0.0 is written."""
        values = without_negative_zeros(values.to(dense.dtype))
        if dense.is_cuda:  # the deterministic form of scatter_ sorts the places there
            dense.masked_scatter_(self.mask(), values)
        else:
            dense.view(-1).scatter_(0, self.places(), values)

    def clear_(self, dense: Shaped[Tensor, "*shape"]) -> None:
        """Write 0 into all other places, whatever is there: -0.0, NaN."""
        dense.masked_fill_(~self.mask(), 0)


def packed_bits(values: Bool[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """One bit a value, the first of a byte the highest, where the values lie."""
    on_cpu = values.device.type == "cpu"
    return torch.from_numpy(np.packbits(values.numpy())) if on_cpu else packed_on_device(values)


def packed_on_device(values: Bool[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """The same by what a GPU does too."""
    bits = nn.functional.pad(values.flatten(), (0, -values.numel() % 8)).view(-1, 8).to(torch.uint8)
    worth = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bits.device)
    return bits.mul_(worth).sum(dim=1, dtype=torch.uint8)


def unpacked(bits: UInt8[Tensor, " bytes"], shape: torch.Size) -> Bool[Tensor, "*shape"]:
    """The inverse."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel()).view(np.bool_)).view(shape)
    return unpacked_on_device(bits, shape)


def unpacked_on_device(bits: UInt8[Tensor, " bytes"], shape: torch.Size) -> Bool[Tensor, "*shape"]:
    """The same by what a GPU does too."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> shifts & 1).bool().flatten()[: shape.numel()].view(shape)


def places_on_device(mask: Bool[Tensor, " weight"], count: int) -> Int[Tensor, " kept"]:
    """Where the `count` kept ones are, in rising order, without waiting for the device where it knows `nonzero_static`:
    CUDA from torch 2.7 on."""
    try:
        return torch.nonzero_static(mask, size=count).squeeze(1)
    except NotImplementedError:
        return mask.nonzero().squeeze(1)


def kept_values(dense: Shaped[Tensor, "*shape"], keep: KeepBits | None) -> Shaped[Tensor, " kept"]:
    """The values at the kept places, in the tensor's dtype; all where `keep` is None."""
    return dense.reshape(-1) if keep is None else keep.gather(dense)


def put_kept(values: Shaped[Tensor, "*_any"], dense: Shaped[Tensor, "*shape"], keep: KeepBits | None) -> None:
    """Write the values into the kept places of `dense`, or into all. No -0.0 is written."""
    if keep is None:
        dense.copy_(without_negative_zeros(values.to(dense.dtype)).view(dense.shape))
    else:
        keep.scatter_(values, dense)


def without_negative_zeros(values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The same numbers, +0.0 where -0.0 was: -0.0 + 0.0 = +0.0 in IEEE 754."""
    return values + 0
