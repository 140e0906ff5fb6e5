"""What the prune stage costs on a GPU that is not here: an estimate from counts, of which nothing was measured there.

    seconds of a block = max(products / rate + states and weights passed over / bandwidth, the host's files)

How often samples pass a block, with and without a gradient, is counted by running the pruner itself on as many samples
in a block of a few weights. A pass with a gradient is three products, one without it one. The host's reading, hashing
and writing go on beside the device's work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.pruner import Pruner
from besa_exp.blocks.units import units
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.statistics import Hessian

DISK, HASH = 2e9, 1.3e9  # bytes a second of an NVMe disk; of sha256 on one core of a server
PASSED_OVER = (40, 10)  # times that a pass reads or writes a number of the states, and of the FFN, besides products
A_STEP = 12  # bytes a weight that a step passes over: weights, ranks, masked weights, gradients


@dataclass(frozen=True)
class Chip:
    """What is reached in practice: FLOP a second in 16-bit numbers and in fp32, bytes a second, and bytes."""

    half: float
    single: float
    bandwidth: float
    memory: float


CHIPS = {
    "h200": Chip(650e12, 50e12, 4.0e12, 141e9),
    "a100": Chip(250e12, 17e12, 1.6e12, 80e9),
}


@dataclass(frozen=True)
class Passes:
    """Of all samples through one block, counted in samples: without and with a gradient; and steps of a search."""

    plain: int
    differentiated: int
    steps: int


def passes_of(pruner: Pruner, goal: Goal, samples: int, batch_size: int) -> Passes:
    """Counted on two blocks of a few weights, of which the second is as any other."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config).requires_grad_(False)
    ids = torch.arange(samples * 4).view(samples, 4) % 16
    blocks = capture_blocks(model, ids)
    inputs = embed(model, blocks, ids, batch_size)
    together = pruner.traits.blocks_together
    last, counts, steps = blocks[-1].module, [0, 0], []

    def count(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        counts[torch.is_grad_enabled()] += len(args[0])

    for size in {*range(1, 17), batch_size}:  # captured by passes that are not counted
        blocks[-1].arguments(size)
    with last.register_forward_pre_hook(count):
        for _ in prune_blocks(units(blocks, together), inputs, pruner, goal, batch_size, steps.append):
            pass
    return Passes(counts[False], counts[True], sum(step.block == blocks[-1].index for step in steps))


def block_seconds(
    chip: Chip, pruner: Pruner, passes: Passes, config: PreTrainedConfig, weights: int, samples: int, seq_len: int
) -> float:
    """Of the device's work on one block with `weights` in its linears, in 16-bit numbers."""
    text = config.get_text_config()
    hidden, ffn = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    a_pass = seq_len * (2 * weights + 2 * seq_len * hidden)  # attention sees half of all pairs, twice
    seconds = a_pass * (passes.plain + 3 * passes.differentiated) / chip.half
    moved = 2 * seq_len * (PASSED_OVER[0] * hidden + PASSED_OVER[1] * ffn)
    seconds += (moved * (passes.plain + 2.5 * passes.differentiated) + A_STEP * weights * passes.steps) / chip.bandwidth
    if pruner.traits.statistic is Hessian:  # q, k, v share one, gate and up; the upper halves alone are summed
        seconds += samples * seq_len * (3 * hidden**2 + ffn**2) * 17 / 16 / chip.half
        seconds += (weights * hidden + hidden * ffn**2 + ffn**3) / chip.single  # factors, and what the kept weights do
    return seconds
