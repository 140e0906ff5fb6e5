"""What is measured of a run on this machine: one block is pruned, a batch is scored, some steps of a recovery taken,
and a file is written beside the run folder. NaN: could not be measured.

    a recovery's step of T tokens:  T t (n b + h) / (b + h) + f P / p

t are the seconds of a token in a step on the model with one block, b and h those of a forward pass in the block and
outside it, f those of a step whatever its tokens, p the values that it trains; there are n blocks and P values.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from besa_exp.blocks.activations import activation_bytes, allocator
from besa_exp.blocks.block import discover_blocks
from besa_exp.blocks.observation import Observed
from besa_exp.checkpoints.files import weights_sha256
from besa_exp.dry_run.probe import SHORTEST, SLOW, BlockProbe, cut_down, kept_for_the_way_back, line
from besa_exp.dry_run.sizes import ModelSize
from besa_exp.dry_run.texts import Texts
from besa_exp.errors import RunError, first_line
from besa_exp.evaluation.batches import bytes_per_token, rows_at_once, tokens_at_once
from besa_exp.machine import atomic
from besa_exp.machine.device import compute_dtype, seconds_of
from besa_exp.machine.memory import free_memory
from besa_exp.methods.budgets.budget import Budget, Counted, pruned_to
from besa_exp.methods.budgets.trial import DepthSearch
from besa_exp.methods.updates.updated import with_update
from besa_exp.recovery.keep_bits import parameters_of_linears
from besa_exp.recovery.recipe import follows_dense, method_of, objective_of, plan_of, steps_of
from besa_exp.recovery.reconstruction import Reconstruction
from besa_exp.recovery.tuner import Objective
from besa_exp.settings import RecoverySettings, RunSettings
from besa_exp.tensors.importance import importance_of
from besa_exp.tensors.keep_bits import KeepBits
from besa_exp.tensors.masks import Goal
from besa_exp.texts.tasks import TASKS

LEAST_WORK = 3  # times the weights of the blocks that are pruned together, which a probe on a CPU needs at least
WRITTEN = 2**25  # bytes of the file that is written to measure the disk
TRIED = 3  # step sizes of a recovery, where none is given
BACKWARD = 3  # forward passes that one both ways costs
LOGITS = 3  # times a step holds them beside what is kept for the way back: as they are, flat, and their gradient
FEWER = 4  # times more tokens has the longer of the two steps of a recovery that are taken


class Disk(NamedTuple):
    """Seconds a byte to write it durably, to read it, to hash it, and to keep it: all of it hashed before and after."""

    write: float
    read: float
    hash: float

    @property
    def keep(self) -> float:
        return self.write + 2 * self.hash


class RecoveryCost(NamedTuple):
    """Seconds of all steps and judgements; bytes of what the method holds, of a checkpoint, of all checkpoints, and of
    what a step holds besides until its gradient is taken."""

    seconds: float = nan
    state: float = nan
    checkpoint: float = nan
    written: float = nan
    working: float = nan


@dataclass(frozen=True)
class Costs:
    """Where activations lie; seconds to prune a block, of a budget over depth, of a scored token in a block and outside
    the blocks; bytes of Python and libraries, of a block at work beyond weights and activations, of a scored batch."""

    activations: str
    disk: Disk
    libraries: float = 0.0
    block: float = nan
    budget: float = nan
    token: tuple[float, float] = (nan, nan)
    working: float = nan
    batch: float = nan
    recovery: RecoveryCost = RecoveryCost()  # noqa: RUF009 - a tuple
    note: str = ""


def measured(
    settings: RunSettings, model: PreTrainedModel, size: ModelSize, texts: Texts, place: Path, device: torch.device
) -> Costs:
    """`model`, built without weights, is cut down to what is measured; `place`: where files would lie. RunError: the
    pruner stops, as the run would."""
    pruner, evaluator = with_update(settings.pruner, settings.update), settings.evaluator
    for used, module in ((settings.tracker.name == "wandb", "wandb"), (evaluator.tasks, "lm_eval.models.huggingface")):
        if used:
            importlib.import_module(module)  # so that this process holds what a run holds
    together, failed = pruner.traits.blocks_together, "time and working memory are not estimated"
    states = activation_bytes(texts.samples, texts.seq_len, size.state, 1, pruner.traits.dense_targets)
    where, allocate = allocator(settings.activations, device, place, states)
    found = Costs(where, disk_speed(place), psutil.Process().memory_info().rss)
    if device.type == "cpu" and LEAST_WORK * together * max(size.blocks) + size.outside > free_memory():
        return replace(found, note=f"{failed}: one block needs more memory")
    goal, batch_size = Goal.parse(settings.sparsity, settings.pattern), settings.calibration.batch_size
    try:
        cut, dtype = cut_down(model, device, together), compute_dtype(settings)
        probe = BlockProbe(cut, device, pruner, goal, batch_size, texts.seq_len, allocate, dtype)
        found = replace(found, token=probe.token_seconds)
        if not settings.is_dense:
            block = probe.cost(texts.samples)
            budget = _budget_seconds(probe, settings.budget, texts.samples, len(size.blocks))
            found = replace(found, block=block.seconds, working=block.working, budget=budget)
        if evaluator.perplexity_sets or evaluator.tasks:
            window, asked = max((length for _, length in texts.windows), default=512), evaluator.batch_size
            rows = rows_at_once(tokens_at_once(cut), window) if asked == "auto" else int(asked)
            found = replace(found, batch=rows * window * bytes_per_token(cut))
        if settings.recovery:
            found = replace(found, recovery=recovery_cost(probe, settings.recovery, len(size.blocks)))
        return found
    except torch.OutOfMemoryError:
        return replace(found, note=f"{failed}: one block did not fit")
    except RunError:
        raise
    except RuntimeError as error:  # as of a block that takes no other one's arguments
        return replace(found, note=f"{failed}: {first_line(error)}")


def _budget_seconds(probe: BlockProbe, budget: object, samples: int, num_blocks: int) -> float:
    """Of a budget over depth: of what it says it asks for, else of what it does with a block."""
    sparsity, length, (in_block, outside) = probe.goal.sparsity, min(probe.seq_len, SHORTEST), probe.token_seconds
    block, hidden = probe.block_of_noise(3, length)
    if isinstance(budget, Counted):
        work = budget.work(num_blocks, samples, probe.seq_len, sparsity)
        observed, _ = Observed.of(importance_of(budget.importance), block, hidden, 1)
        a_pruning = seconds_of(probe.device, lambda: [*pruned_to(block, observed, [sparsity])]) / len(block.layers)
        return work.prunings * a_pruning + work.seconds_of_passes(probe.seq_len, in_block, outside)
    if not isinstance(budget, Budget):
        return nan if isinstance(budget, DepthSearch) else 0.0

    def seconds(count: int) -> float:
        given = hidden[:count].clone()
        return seconds_of(probe.device, lambda: budget.sparsities(block.layers[:1], given, sparsity, 1))

    per_sample, fixed = line(1, seconds(1), 3, seconds(3))
    return num_blocks * (fixed + samples * per_sample * probe.seq_len / length)


def recovery_cost(probe: BlockProbe, asked: RecoverySettings, num_blocks: int) -> RecoveryCost:
    """Expected of a run; examples of a task have at most as many tokens as a window. The probe's model is left
    pruned."""
    model, seq_len, (in_block, head) = probe.model, asked.seq_len or probe.seq_len, probe.token_seconds
    asked, (path, modules) = replace(asked, seq_len=seq_len), discover_blocks(model)
    steps, method, plan, times = steps_of(asked), method_of(asked), plan_of(asked), num_blocks / len(modules)
    teacher = copy.deepcopy(model) if follows_dense(asked) else None
    tuner = method.begin(model, _pruned_at_random(probe), asked.seed)
    tokens = max(2 * FEWER, min(asked.batch_size * seq_len, int(SLOW / BACKWARD / (in_block + head))))
    length = min(seq_len, tokens // FEWER)
    rows = tokens // length
    text = replace(asked, task=None, seq_len=length)
    objective = objective_of(text, method, model, teacher)
    predicted = head * (not isinstance(objective, Reconstruction))  # of a step; judgements predict all the same

    def step(number: int, rows: int, objective: Objective = objective) -> float:
        windows = torch.randint(0, 2, (rows, length), generator=torch.Generator().manual_seed(number))
        return seconds_of(probe.device, lambda: tuner.step(objective, windows, number, 1e-6))

    def bytes_of(own: Mapping[str, Tensor]) -> float:
        return sum(one.nbytes * (times if name.startswith(f"{path}.") else 1) for name, one in own.items())

    with kept_for_the_way_back(model, modules) as kept:  # by the first one, which also does what is done once
        step(0, 1, objective_of(replace(text, checkpointing=False), method, model, teacher))
    a_token, fixed = line(length, step(1, 1), rows * length, step(2, rows))
    state = bytes_of(tuner.state())
    trained = {name: one.data for name, one in tuner.parameters.items()}
    checkpoint = state + bytes_of(trained)
    fixed *= bytes_of(trained) / sum(one.nbytes for one in trained.values())
    window = seq_len * (1 if asked.task is None else TASKS[asked.task].count)
    a_token *= (num_blocks * in_block + predicted) / (len(modules) * in_block + predicted)
    a_step = asked.batch_size * window * a_token + fixed
    judgements = 1 + sum(plan.judges_after(number) for number in range(1, steps + 1))
    judged = judgements * asked.held_out + (0 if asked.task is None else 2 * asked.tested)  # before and after
    seconds = (steps + TRIED * plan.trial) * a_step + judged * window * (num_blocks * in_block + head)
    inside, outside = (size / length for size in kept())
    inside *= 1 if isinstance(objective, Reconstruction) or asked.checkpointing else times
    if asked.checkpointing:  # each block's inputs stay, and one block is computed again
        inside += num_blocks * probe.model.config.get_text_config().hidden_size * model.dtype.itemsize
    embeddings: Any = model.get_input_embeddings()
    logits = LOGITS * embeddings.num_embeddings * model.dtype.itemsize if outside else 0
    gradient = bytes_of({name: one for name, one in tuner.state().items() if name.endswith("exp_avg")})
    working = asked.windows_together * window * (inside + outside + logits) + gradient
    return RecoveryCost(seconds, state, checkpoint, judgements * checkpoint, working)


@torch.no_grad()
def _pruned_at_random(probe: BlockProbe) -> dict[str, KeepBits]:
    """The probe's model with as many zeros in its blocks' linears as are the goal, and what is kept."""
    keep, generator = {}, torch.Generator().manual_seed(0)
    for name, parameter in parameters_of_linears(probe.model).items() if probe.goal.sparsity else ():
        mask = torch.rand(parameter.shape, generator=generator) >= probe.goal.sparsity
        keep[name] = KeepBits.of(mask.to(parameter.device))
        keep[name].clear_(parameter)
    return keep


def disk_speed(place: Path) -> Disk:
    """Of the disk of `place`. Reading comes from the system's cache, as of files that were just written; a cold disk
    takes longer."""
    with tempfile.TemporaryDirectory(dir=place, prefix=".besa-probe-") as folder:
        path, clock = Path(folder, "probe.safetensors"), torch.device("cpu")
        drawn = torch.randint(-(2**62), 2**62, (WRITTEN // 8,))  # what no file system makes smaller

        def write() -> None:
            with atomic.replaced_file(path) as partial_file:
                save_file({"probe": drawn}, partial_file)

        written = min(seconds_of(clock, write) for _ in range(2))
        read = seconds_of(clock, load_file(path)["probe"].clone)
        hashed = seconds_of(clock, lambda: weights_sha256({"probe": drawn}))
    return Disk(written / WRITTEN, read / WRITTEN, hashed / WRITTEN)
