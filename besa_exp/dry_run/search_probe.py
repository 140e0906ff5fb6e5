"""What a budget over depth holds, and what its search over whole models takes: ranks and a forward pass of one block,
and the head, are timed."""

from __future__ import annotations

import torch

from besa_exp.blocks.block import Hidden
from besa_exp.blocks.head import head_of
from besa_exp.dry_run.block_probe import BlockProbe
from besa_exp.dry_run.meters import seconds_of
from besa_exp.dry_run.plan import Dealing
from besa_exp.methods.budgets.budget import Budget, pruned_to
from besa_exp.methods.budgets.trial import TOKENS, Search
from besa_exp.methods.budgets.uniform import Uniform


def dealing(
    budget: Budget | Search | Uniform | None, num_blocks: int, num_samples: int, seq_len: int, sparsity: float
) -> Dealing | None:
    """What the budget asks for; None where it asks for nothing."""
    if isinstance(budget, Search):
        work = budget.work(num_blocks, num_samples, seq_len, sparsity)
        rows = max(1, min(TOKENS // seq_len, num_samples))
        held = num_samples + 2 * work.side_by_side  # the dense outputs; of each tried model before a block and after
        return Dealing(num_blocks * num_samples, held, 1 + work.passes, rows * seq_len)
    if isinstance(budget, Budget):
        return Dealing(budget.passes(num_blocks, num_samples), budget.states(num_blocks, num_samples))
    return None


def search_seconds(probe: BlockProbe, search: Search, num_blocks: int, num_samples: int, seq_len: int) -> float:
    """At most: that tried models begin alike saves a part. Measured on a sample of 256 tokens where they are longer."""
    work = search.work(num_blocks, num_samples, seq_len, probe.target.sparsity)
    length = min(seq_len, 256)
    block, hidden = probe.block_of_noise(1, length)
    head = head_of(probe.model, block.layers, torch.zeros(1, length, dtype=torch.int64))
    norms = {
        name: torch.ones(linear.weight.shape[1], device=linear.weight.device) for name, linear in block.linears.items()
    }
    a_pass = seconds_of(probe.device, lambda: [*pruned_to(block, norms, [probe.target.sparsity])])
    a_head = min(seconds_of(probe.device, lambda: _compared(head(hidden))) for _ in range(2)) / length
    a_pass /= len(block.layers)
    a_token = probe.forward_seconds(1, length) / length
    return num_blocks * (work.passes * a_pass + work.tokens * a_token) + work.tokens * a_head


def _compared(logits: Hidden) -> float:
    """What a divergence takes besides the logits."""
    found = logits.float().log_softmax(dim=-1)
    return float((found.exp() * (found - found)).sum(dim=-1).double().sum())
