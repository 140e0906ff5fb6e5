"""What the prune stage costs on a GPU that is not here: an estimate from counts, of which nothing was measured there.

    seconds of a block = products / rate + states and weights passed over / bandwidth

How often samples pass a block, with and without a gradient, is counted by running the pruner itself on as many samples
in a block of a few weights. A pass with a gradient is three products, one without it one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import nan
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from besa_exp.blocks.activations import allocator
from besa_exp.blocks.pruner import Pruner
from besa_exp.dry_run.costs import Costs, Disk
from besa_exp.dry_run.probe import BlockProbe, cut_down
from besa_exp.dry_run.sizes import ModelSize
from besa_exp.methods.budgets.uniform import SameForAll
from besa_exp.methods.updates.updated import with_update
from besa_exp.settings import RunSettings
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.statistics import Hessian

DISK = Disk(1 / 2e9, 1 / 2e9, 1 / 1.3e9)  # an NVMe disk; sha256 on one core of a server
PASSED_OVER = (40, 10)  # times that a pass reads or writes a number of the states, and of the FFN, besides products
A_STEP = 12  # bytes a weight that a step passes over: weights, ranks, masked weights, gradients


@dataclass(frozen=True)
class Chip:
    """What is reached in practice: FLOP a second in 16-bit numbers and in fp32, bytes a second, and bytes."""

    half: float
    single: float
    bandwidth: float
    memory: int


CHIPS = {
    "h200": Chip(650e12, 50e12, 4.0e12, 141 * 10**9),
    "a100": Chip(250e12, 17e12, 1.6e12, 80 * 10**9),
}


def passes_of(pruner: Pruner, goal: Goal, samples: int, batch_size: int) -> tuple[float, float, float]:
    """Of all samples through one block, counted in samples: without and with a gradient; and steps of a search."""
    device, counts = torch.device("cpu"), Counter[bool]()
    together = pruner.traits.blocks_together
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1}
    with init_empty_weights():
        model = LlamaForCausalLM(LlamaConfig.from_dict({**sizes, "num_hidden_layers": together}))
    cut_down(model, device, together)
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]

    def count(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        counts[torch.is_grad_enabled()] += len(given[0])

    for linear in linears:
        linear.register_forward_pre_hook(count)
    probe = BlockProbe(model, device, pruner, goal, batch_size, 4, allocator("device", device, Path(), 0)[1])
    steps = probe.prune(samples, 4).steps
    return counts[False] / len(linears), counts[True] / len(linears), steps


def counted(settings: RunSettings, model: PreTrainedModel, size: ModelSize, seq_len: int) -> Costs:
    """Of pruning a block in 16-bit numbers on the chip `settings.device_name`."""
    chip, pruner = CHIPS[settings.device_name], with_update(settings.pruner, settings.update)
    samples, goal = settings.calibration.num_samples, Goal.parse(settings.sparsity, settings.pattern)
    plain, differentiated, steps = passes_of(pruner, goal, samples, settings.calibration.batch_size)
    text, weights = model.config.get_text_config(), 8 * size.masks // len(size.blocks)
    hidden, ffn = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    a_pass = seq_len * (2 * weights + 2 * seq_len * hidden)  # attention sees half of all pairs, twice
    seconds = a_pass * (plain + 3 * differentiated) / chip.half
    moved = 2 * seq_len * (PASSED_OVER[0] * hidden + PASSED_OVER[1] * ffn)
    seconds += (moved * (plain + 2.5 * differentiated) + A_STEP * weights * steps) / chip.bandwidth
    if pruner.traits.observed(goal) is Hessian:  # q, k, v share one, gate and up; the upper halves alone are summed
        seconds += samples * seq_len * (3 * hidden**2 + ffn**2) * 17 / 16 / chip.half
        seconds += (weights * hidden + hidden * ffn**2 + ffn**3) / chip.single  # factors, and what the kept weights do
    note = (
        f"an estimate from counts for {settings.device_name}, on which nothing was measured: a sample passes a block "
        f"{plain / samples:.2f} times without and {differentiated / samples:.2f} times with a gradient; fetching, "
        "calibration text and scoring are not counted; a disk of 2 GB/s and hashes of 1.3 GB/s are assumed"
    )
    budget = 0.0 if isinstance(settings.budget, SameForAll | None) else nan
    in_block = (a_pass / chip.half + moved / chip.bandwidth) / seq_len
    predicted = 2 * text.vocab_size * hidden / chip.half
    return Costs("device", DISK, block=seconds, budget=budget, token=(in_block, predicted), note=note)
