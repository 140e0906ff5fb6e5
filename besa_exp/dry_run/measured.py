"""What is measured of a run on this machine: one block is pruned, a batch is scored, some steps of a recovery taken."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from besa_exp.blocks.activations import activation_bytes, allocator
from besa_exp.blocks.observation import Observed
from besa_exp.checkpoints.streaming import give_back_memory
from besa_exp.dry_run.probe import SHORTEST, BlockCost, BlockProbe, cut_down
from besa_exp.dry_run.recovery import RecoveryCost, recovery_cost
from besa_exp.dry_run.sizes import ModelSize
from besa_exp.dry_run.texts import Texts
from besa_exp.errors import RunError, first_line
from besa_exp.evaluation.batches import bytes_per_token, rows_at_once, tokens_at_once
from besa_exp.machine.device import compute_dtype, seconds_of
from besa_exp.machine.memory import free_memory
from besa_exp.methods.budgets.budget import Budget, pruned_to
from besa_exp.methods.budgets.trial import DepthSearch
from besa_exp.methods.updates.updated import with_update
from besa_exp.settings import RunSettings
from besa_exp.tensors.importance import importance_of
from besa_exp.tensors.masks import Goal

LEAST_WORK = 3  # times the weights of the blocks that are pruned together, which a probe on a CPU needs at least
SLOW = 1.0  # seconds that a scored batch may take; a smaller one is measured where it takes longer


@dataclass(frozen=True)
class Measured:
    """None: could not be measured, and `note` says why. `budget`: seconds of a budget over depth. `token`: seconds of a
    scored token, in a block and outside the blocks; `batch_bytes`: what a scored batch holds."""

    libraries: int
    activations_at: str
    block: BlockCost | None = None
    budget: float | None = 0.0
    token: tuple[float, float] = (0.0, 0.0)
    batch_bytes: int | None = None
    recovery: RecoveryCost | None = None
    note: str = ""


def measured(
    settings: RunSettings, model: PreTrainedModel, size: ModelSize, texts: Texts, place: Path, device: torch.device
) -> Measured:
    """`model`, built without weights, is cut down to what is measured; `place`: where activations in files would lie.
    RunError: the pruner stops, as the run would."""
    pruner, evaluator = with_update(settings.pruner, settings.update), settings.evaluator
    for used, module in ((settings.tracker.name == "wandb", "wandb"), (evaluator.tasks, "lm_eval.models.huggingface")):
        if used:
            importlib.import_module(module)  # so that this process holds what a run holds
    states = activation_bytes(texts.samples, texts.seq_len, size.state, 1, pruner.traits.dense_targets)
    where, allocate = allocator(settings.activations, device, place, states)
    give_back_memory()
    bare = Measured(psutil.Process().memory_info().rss, where)
    together, failed = pruner.traits.blocks_together, "time and working memory are not estimated"
    if device.type == "cpu" and LEAST_WORK * together * max(size.blocks) + size.outside > free_memory():
        return replace(bare, note=f"{failed}: one block needs more memory")
    goal, batch_size = Goal.parse(settings.sparsity, settings.pattern), settings.calibration.batch_size
    try:
        cut = cut_down(model, device, together)
        probe = BlockProbe(cut, device, pruner, goal, batch_size, allocate, compute_dtype(settings))
        found = replace(bare, block=probe.cost(texts.samples, texts.seq_len))
        found = replace(found, budget=_budget_seconds(probe, settings, texts, len(size.blocks)))
        if evaluator.perplexity_sets or evaluator.tasks:
            found = _scored(found, probe, texts, evaluator.batch_size)
        if asked := settings.recovery:
            cost = recovery_cost(probe, asked, asked.seq_len or texts.seq_len, len(size.blocks))
            found = replace(found, recovery=cost)
        return found
    except torch.OutOfMemoryError:
        return replace(bare, note=f"{failed}: one block did not fit")
    except RunError:
        raise
    except RuntimeError as error:  # as of a block that takes no other one's arguments
        return replace(bare, note=f"{failed}: {first_line(error)}")


def _budget_seconds(probe: BlockProbe, settings: RunSettings, texts: Texts, num_blocks: int) -> float:
    """Of a budget over depth: its passes, counted, and what it does besides with a block's weights; of a search over
    whole models what it says it will ask for, at most."""
    budget, sparsity, length = settings.budget, probe.goal.sparsity, min(texts.seq_len, 256)
    a_token = probe.forward_seconds(1, length) / length
    block, hidden = probe.block_of_noise(1, length)
    if isinstance(budget, DepthSearch):
        work = budget.work(num_blocks, texts.samples, texts.seq_len, sparsity)
        observed, _ = Observed.of(importance_of(budget.importance), block, hidden, 1)
        a_pass = seconds_of(probe.device, lambda: [*pruned_to(block, observed, [sparsity])]) / len(block.layers)
        a_head = probe.head_seconds(1, length) / length
        return num_blocks * (work.passes * a_pass + work.tokens * a_token) + work.tokens * a_head
    if not isinstance(budget, Budget):
        return 0.0
    ask = partial(budget.sparsities, sparsity=sparsity, batch_size=probe.batch_size)
    passes = probe.passes(ask, num_blocks, texts.samples)
    besides = seconds_of(probe.device, lambda: ask(block.layers[:1], hidden)) - length * a_token
    return passes * texts.seq_len * a_token + num_blocks * max(0.0, besides)


def _scored(found: Measured, probe: BlockProbe, texts: Texts, batch_size: int | str) -> Measured:
    """With the seconds of a scored token and the bytes of a batch: measured on a batch of the run, or on a part of it
    on a slow device."""
    window = max((length for _, length in texts.windows), default=min(512, texts.seq_len))
    rows = rows_at_once(tokens_at_once(probe.model), window) if batch_size == "auto" else int(batch_size)
    short = min(window, SHORTEST)
    a_token = (probe.forward_seconds(1, short) + probe.head_seconds(1, short)) / short
    tokens = min(rows * window, max(short, int(SLOW / a_token)))
    tried, length = max(1, tokens // window), min(window, tokens)
    seconds = (probe.forward_seconds(tried, length), probe.head_seconds(tried, length))
    in_block, outside = (value / (tried * length) for value in seconds)
    return replace(found, token=(in_block, outside), batch_bytes=rows * window * bytes_per_token(probe.model))
