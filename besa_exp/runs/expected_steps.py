"""How many optimisation steps a block will take: what a progress line needs before the first block is done."""

from __future__ import annotations

import math
from typing import Any

from besa_exp.blocks.probe import num_learned
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.besa_paper import BesaPaper


def steps_of_block(pruner: Any, num_samples: int) -> int | None:
    """None: not known before a block has shown it, or none at all."""
    learn = num_learned(num_samples)
    if isinstance(pruner, Besa):
        parts = 2 if pruner.scope == "sub_block" else 1
        return parts * pruner.epochs * math.ceil(learn / pruner.batch_size)
    if isinstance(pruner, BesaPaper):
        return pruner.epochs * math.ceil(num_samples / pruner.batch_size)
    tuning = getattr(pruner, "tuning", None)
    return tuning.num_steps(learn) if tuning is not None else None
