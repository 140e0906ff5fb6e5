"""Weights that are not finite are named before any long work: otherwise they would show up as a NaN loss or state far
from where they are, or, in a row of the embedding that few texts need, at some late sample."""

from __future__ import annotations

from torch import nn

from besa_exp.errors import RunError
from besa_exp.tensors.statistics import is_finite


def check_finite_weights(model: nn.Module, path: str) -> None:
    """RunError: a weight that is in memory (a streamed model's blocks are not) holds NaN or infinity."""
    for name, weight in model.named_parameters():
        if not weight.is_meta and weight.is_floating_point() and weight.numel() and not is_finite(weight.detach()):
            raise RunError(
                f"model.path={path}: {name} holds NaN or infinity: the model is broken as it is saved, or overflows as "
                f"{str(weight.dtype).removeprefix('torch.')}; copy it again, or set model.dtype=float32"
            )
