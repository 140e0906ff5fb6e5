"""The samples that a search does not learn from, and the checks of what it computes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.blocks.reports import Step
from besa_exp.errors import RunError
from besa_exp.machine import distributed
from besa_exp.tensors.losses import Loss, token_loss

logger = logging.getLogger(__name__)


def finite_step(
    block: Block, step: int, loss: Tensor, reconstruction: Tensor, penalty: Tensor | float, sparsity: Tensor | float
) -> Step:
    """The record of one optimisation step. RunError: the loss is not finite."""
    loss, reconstruction = loss.detach(), reconstruction.detach()
    if not torch.isfinite(loss):
        raise RunError(
            f"{block.name}: the loss is {float(loss)} at step {step}; its inputs or targets are not finite, or the "
            "model's dtype overflows: load it in float32 or bfloat16 (model.dtype)."
        )
    values = (float(torch.as_tensor(value).detach()) for value in (loss, reconstruction, penalty, sparsity))
    return Step(block.index, step, *values)


def checked_gradient(step: Step, gradient: Tensor) -> Tensor:
    """`gradient` itself. RunError: it is not finite. Where it is all zero although there is a loss, a warning is
    logged: the search learns nothing in such a step."""
    largest = float(gradient.abs().max())
    if not math.isfinite(largest):
        raise RunError(
            f"block {step.block}: the gradient is {largest} at step {step.step}; the dtype overflows: compute in "
            "float32 or bfloat16 (compute_dtype or model.dtype)."
        )
    if largest == 0 and step.reconstruction > 0:
        logger.warning(
            "block %d: the gradient of step %d is zero everywhere although the loss is %.3g, so nothing is learned "
            "from it; compute in float32 or bfloat16 (compute_dtype or model.dtype)",
            step.block,
            step.step,
            step.reconstruction,
        )
    return gradient


def num_probe_samples(num_samples: int) -> int:
    """How many samples, the last ones, a search does not learn from: they choose between its states and give the
    reported losses."""
    return max(1, min(16, num_samples // 8))


def own_probe(samples: Hidden) -> Float[Tensor, "probe seq hidden"]:
    """This rank's part of the probe samples, given all that it owns."""
    num_samples = distributed.total(len(samples))
    return samples[distributed.own_place(num_samples - num_probe_samples(num_samples)) :]


def probe_loss(
    block: Block, inputs: Hidden, targets: Hidden, weights: Mapping[str, Tensor], loss: Loss = token_loss
) -> float:
    """The loss of the probe samples with `weights` in place of the block's own. RunError: not finite."""
    probe = own_probe(inputs)
    return finite_loss(block, block.outputs(probe, max(1, len(probe)), weights), own_probe(targets), loss)


def finite_loss(block: Block, outputs: Hidden, targets: Hidden, loss: Loss = token_loss) -> float:
    value = float(loss(outputs, targets))
    if not math.isfinite(value):
        raise RunError(
            f"{block.name}: the reconstruction loss is {value}; its inputs, targets or outputs are not finite."
        )
    return value
