"""The samples that a search does not learn from, and their loss."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from besa_exp.blocks.block import Block, Hidden
from besa_exp.errors import RunError
from besa_exp.machine import distributed
from besa_exp.tensors.losses import Loss, token_errors, token_loss

MASSIVE = 30  # the massive token of a real model (arXiv 2402.17762) is about a hundred times as large as the others


def num_probe_samples(num_samples: int) -> int:
    """How many samples, the last ones, a search does not learn from: they choose between its states and give the
    reported losses."""
    return max(1, min(16, num_samples // 8))


def num_learned(num_samples: int) -> int:
    """How many samples, the first ones, a search learns from; a single one judges too."""
    return max(1, num_samples - num_probe_samples(num_samples))


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


def massive_tokens(outputs: Hidden, targets: Hidden) -> tuple[int, int]:
    """How many of the targets are massive (MASSIVE times as large as the median of their window), and how many of these
    the outputs have lost: less than half of their squared size is right. Over all ranks."""
    sizes = targets.float().norm(dim=-1)
    massive = sizes > MASSIVE * sizes.median(dim=-1, keepdim=True).values
    lost = massive & (token_errors(outputs, targets) > 0.5)
    counts = distributed.all_sum(torch.stack([massive.sum(), lost.sum()]).float()).tolist()
    return int(counts[0]), int(counts[1])


def finite_loss(block: Block, outputs: Hidden, targets: Hidden, loss: Loss = token_loss) -> float:
    value = float(loss(outputs, targets))
    if not math.isfinite(value):
        raise RunError(
            f"{block.name}: the reconstruction loss is {value}; its inputs, targets or outputs are not finite."
        )
    return value
