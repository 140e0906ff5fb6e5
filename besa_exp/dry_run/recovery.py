"""What a recovery costs on this machine: some of its own steps are taken on the model with one block.

    a step of T tokens:  f S + T (n (t - h) + h)

f and t are the fixed seconds and those of a token, from two steps of different lengths on the model with one block; h
are those of a token outside the blocks, three times a forward pass of the head; n blocks there are, and S is how many
times more the method holds for all of them than for one: what is fixed is the optimiser's work on that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from besa_exp.blocks.block import discover_blocks
from besa_exp.dry_run.probe import BlockProbe, line
from besa_exp.machine.device import seconds_of
from besa_exp.recovery.keep_bits import KeepBits, parameters_of_linears
from besa_exp.recovery.recipe import follows_dense, method_of, objective_of, plan_of, steps_of
from besa_exp.recovery.tuner import Tuner
from besa_exp.settings import RecoverySettings
from besa_exp.texts.tasks import TASKS

STEP = 1.0  # seconds that a measured step should take at most
TRIED = 3  # step sizes, where none is given
BACKWARD = 3  # forward passes that one both ways costs


@dataclass(frozen=True)
class RecoveryCost:
    """Seconds of all steps and judgements, how often checkpoints are written, and bytes of what the method holds and of
    a checkpoint: that, and the parameters it moves."""

    seconds: float
    checkpoints: int
    state_bytes: int
    kept_bytes: int


def recovery_cost(probe: BlockProbe, asked: RecoverySettings, seq_len: int, num_blocks: int) -> RecoveryCost:
    """Expected of a run on windows of `seq_len` tokens, which examples of a task have at most. The probe's model is
    left pruned."""
    asked = replace(asked, seq_len=seq_len)
    model, steps = probe.model, steps_of(asked)
    teacher = copy.deepcopy(model) if follows_dense(asked) else None
    keep = pruned_at_random(model, probe.goal.sparsity)
    a_token = probe.forward_seconds(1, min(seq_len, 256)) / min(seq_len, 256)
    longer = max(4, min(seq_len, 256, int(STEP / (2 * BACKWARD * a_token))))
    method = method_of(asked)
    begun: list[Tuner] = []
    preparing = seconds_of(probe.device, lambda: begun.append(method.begin(model, keep, asked.seed)))
    (tuner,) = begun

    def step(number: int, length: int) -> float:
        windows = torch.randint(0, 2, (1, length), generator=torch.Generator().manual_seed(number))
        short = replace(asked, micro_batch=1, task=None, seq_len=length)
        objective = objective_of(short, method, model, teacher)
        return seconds_of(probe.device, lambda: tuner.step(objective, windows, number, 1e-6))

    lengths = (longer, longer // 2, longer // 2, longer)  # the first step of a length does what is done once
    _, _, few, many = (step(number, length) for number, length in enumerate(lengths))
    per_token, fixed = line(longer // 2, few, longer, many)
    path, modules = discover_blocks(model)
    times = num_blocks / len(modules)
    state = extrapolated(tuner.state(), path, times)
    moved = extrapolated({name: own.data for name, own in tuner.parameters.items()}, path, times)
    head = probe.head_seconds(1, longer) / longer
    outside = min(per_token, BACKWARD * head)
    a_step = fixed * state / max(1, extrapolated(tuner.state(), path, 1))
    options = 1 if asked.task is None else len(TASKS[asked.task].words)
    a_step += asked.batch_size * options * seq_len * (times * (per_token - outside) + outside)
    a_judgement = asked.held_out * options * seq_len * (num_blocks * a_token + head)
    plan = plan_of(asked)
    judgements = 1 + sum(plan.judges_after(number) for number in range(1, steps + 1))
    scored = 0 if asked.task is None else 2 * asked.tested / asked.held_out  # before and after
    taken = steps + TRIED * plan.trial
    seconds = preparing * times + taken * a_step + (judgements + scored) * a_judgement
    return RecoveryCost(seconds, judgements, state, state + moved)


@torch.no_grad()
def pruned_at_random(model: PreTrainedModel, sparsity: float) -> dict[str, KeepBits]:
    """The model with so many zeros in its blocks' linears, and what is kept."""
    if sparsity == 0:
        return {}
    keep = {}
    for name, parameter in parameters_of_linears(model).items():
        mask = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) >= sparsity
        keep[name] = KeepBits.of(mask.to(parameter.device))
        keep[name].clear_(parameter)
    return keep


def extrapolated(tensors: Mapping[str, Tensor], path: str, times: float) -> int:
    """Bytes of what is in blocks, which lie at `path`, so many times, and of what is outside."""
    sizes = (tensor.nbytes * (times if name.startswith(f"{path}.") else 1) for name, tensor in tensors.items())
    return int(sum(sizes))
