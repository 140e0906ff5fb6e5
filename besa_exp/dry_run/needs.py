"""What a run needs of memory and disk, part by part, and when; formulas of plain numbers, no torch here.

A part is held during some phases. What a place must hold is the largest sum over the parts of one phase:

    need(place) = max over phases of the sum of the place's parts in that phase.

Exact: weights, activations, statistics, finished blocks, masks, saved shards (up to the headers of the files). Measured
by a probe of one block (`block_probe.py`): what a pruner and a forward pass hold while they work. Estimated: logs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from besa_exp.dry_run.plan import Place, Plan

Phase = Literal["load", "budget", "prune", "save", "evaluate"]
PHASES: tuple[Phase, ...] = ("load", "budget", "prune", "save", "evaluate")
STEP_BYTES = 170  # a line of metrics.jsonl for a step (seen: 150 to 165)
LINEAR_BYTES = 200  # a linear's part of a block's line, report and row of sparsity.csv
BASE_LOG_BYTES = 200_000  # config, environment, results, status, run.log, and W&B's own start
LOGITS_HELD = 5  # fp32 tensors of logits' size in `Trial`: of the dense model and the tried one, and what compares them
RANK_BYTES = 2  # of a weight
WANDB_TIMES = 4  # what W&B writes for each byte of metrics.jsonl, its copy of the console included


@dataclass(frozen=True)
class Need:
    """A part of a run: `size` bytes (None: not estimated) at `place` during `phases`; `remedy` makes it smaller."""

    part: str
    place: Place
    size: int | None
    phases: tuple[Phase, ...] = PHASES
    remedy: str = ""


def needs(plan: Plan) -> list[Need]:
    """Every part, as the table lists them."""
    return [*_weights(plan), *_while_pruning(plan), *_while_evaluating(plan), *_files(plan)]


def needs_of_scoring(parts: Sequence[Need]) -> list[Need]:
    """Of a dense model, which is loaded and scored: without what pruning leaves or needs."""
    found = []
    for part in parts:
        kept = tuple(phase for phase in part.phases if phase in ("load", "evaluate"))
        left_by_pruning = "save" in part.phases and "load" not in part.phases
        if kept and not left_by_pruning:
            found.append(replace(part, phases=kept))
    return found


def _memory(plan: Plan) -> Place:
    return "device" if plan.on_cuda else "host"


def _weights(plan: Plan) -> list[Need]:
    size, memory = plan.size, _memory(plan)
    found = [Need("Python and libraries", "host", plan.libraries)]
    if plan.streamed:
        found.append(Need("weights outside the blocks", memory, size.outside_bytes))
        block, others = size.largest_block_bytes, size.largest_block_bytes * (plan.together - 1)
        when: tuple[Phase, ...] = ("budget", "prune", "evaluate")
        found.append(Need("weights of the block at work", memory, block, when))
        if others:
            found.append(Need("weights pruned together with them", memory, others, ("prune",), "pruner.scope=block"))
        if plan.on_cuda:
            found.append(Need("a block on its way", "host", block, when))
        if plan.save_model:
            found.append(Need("saved model, loaded anew", memory, size.outside_bytes, ("save", "evaluate")))
        return found
    remedy = "model.load=streamed"
    found.append(Need("weights", memory, size.total_bytes, remedy=remedy))
    if plan.on_cuda:
        found.append(Need("weights on their way", "host", size.total_bytes, ("load", "save"), remedy))
    if plan.save_model:
        when = ("save", "evaluate") if plan.on_cuda else ("evaluate",)  # a CPU maps files, and reads late
        found.append(Need("saved model, loaded anew", memory, size.total_bytes, when, remedy))
    return found


def _while_pruning(plan: Plan) -> list[Need]:
    memory, working = _memory(plan), plan.working
    states = _states_bytes(plan, plan.samples)
    activations = states * (4 if plan.dense_targets else 2)
    elsewhere = {"device": "activations=host", "host": "activations=disk", "disk": ""}[plan.activations_at]
    fewer = "a smaller calibration.num_samples or .seq_len"
    deciding = None if None in (working.forward, working.pruner) else max(working.forward or 0, working.pruner or 0)
    found = _while_dealing_out(plan)
    if plan.own_targets:
        remedy = f"pruner.scope=block or {fewer}"
        found.append(Need("targets of a block's parts", _beside_activations(plan), states, ("prune",), remedy))
    return [
        *found,
        Need(
            "activations and targets",
            plan.activations_at,
            activations,
            ("prune",),
            " or ".join(filter(None, (elsewhere, fewer))),
        ),
        Need("statistics of a block", memory, working.statistics, ("prune",)),
        Need("pruner and forward pass at work", memory, deciding, ("prune",), "a smaller calibration.batch_size"),
    ]


def _while_dealing_out(plan: Plan) -> list[Need]:
    """A budget over depth goes through the dense blocks with inputs of its own, before the block loop has any."""
    if plan.dealing is None:
        return []
    inputs, compared = (_states_bytes(plan, samples) for samples in (plan.samples, plan.dealing.states))
    found = [Need("budget: inputs", plan.activations_at, inputs, ("budget",))]
    found.append(Need("budget: forward pass at work", _memory(plan), plan.working.forward, ("budget",)))
    if compared:
        remedy = "a smaller budget.num_samples"
        found.append(Need("budget: states to compare", _beside_activations(plan), compared, ("budget",), remedy))
    if plan.dealing.tried_tokens:
        logits = LOGITS_HELD * plan.dealing.tried_tokens * plan.size.vocabulary * 4
        tried = plan.size.largest_block_bytes + max(plan.size.blocks) * RANK_BYTES
        found.append(Need("budget: logits of a tried model", _memory(plan), logits, ("budget",)))
        found.append(Need("budget: a tried block and its ranks", _memory(plan), tried, ("budget",)))
    return found


def _states_bytes(plan: Plan, samples: int) -> int:
    return samples * plan.seq_len * plan.size.hidden * plan.size.itemsize


def _beside_activations(plan: Plan) -> Place:
    """Where a tensor like the activations lies: in memory where they are in files."""
    return "host" if plan.activations_at == "disk" else plan.activations_at


def _while_evaluating(plan: Plan) -> list[Need]:
    if not plan.evaluates:
        return []
    memory = _memory(plan)
    found = [
        Need("evaluation: a batch's logits", memory, plan.working.evaluation, ("evaluate",), "evaluator.batch_size=1")
    ]
    if plan.streamed and plan.windows_tokens:
        states = plan.windows_tokens * plan.size.hidden * plan.size.itemsize
        found.append(Need("evaluation: hidden states", memory, states, ("evaluate",)))
    return found


def _files(plan: Plan) -> list[Need]:
    size = plan.size
    until_saved: tuple[Phase, ...] = ("prune", "save", "evaluate")
    found = [Need("finished blocks, until the run is done", "disk", size.blocks_bytes, until_saved)]
    found.append(Need("their masks, until the run is done", "disk", size.masks, until_saved))
    if plan.save_model:
        less = "save.model=false" + ("" if plan.streamed else " or model.load=streamed (which saves no block twice)")
        remedy = "" if plan.links_blocks else less
        found.append(Need("saved shards", "disk", plan.saved_anew, ("save", "evaluate"), remedy))
    if plan.save_masks:
        found.append(Need("masks.safetensors", "disk", size.masks, ("save", "evaluate")))
    logs = log_bytes(plan.steps, plan.size.linears)
    found.append(Need("logs and metrics", "disk", logs))
    if plan.wandb:
        found.append(Need("W&B", "disk", WANDB_TIMES * logs))
    return found


def log_bytes(steps: int, linears: int) -> int:
    """metrics.jsonl and what is written beside it, for `steps` of all blocks and the `linears` of all blocks."""
    return BASE_LOG_BYTES + steps * STEP_BYTES + linears * 2 * LINEAR_BYTES


def kept_bytes(plan: Plan) -> int:
    """What the run folder still holds when the run is done."""
    model = plan.size.total_bytes if plan.save_model else 0
    logs = log_bytes(plan.steps, plan.size.linears) * (1 + WANDB_TIMES * plan.wandb)
    return model + (plan.size.masks if plan.save_masks else 0) + logs


def peak(parts: Sequence[Need], place: Place) -> tuple[int, Phase]:
    """The most that `place` must hold at once, and in which phase; parts that are not estimated count nothing."""
    sums = {
        phase: sum(part.size or 0 for part in parts if part.place == place and phase in part.phases) for phase in PHASES
    }
    phase = max(PHASES, key=sums.__getitem__)
    return sums[phase], phase


def remedies(parts: Sequence[Need], place: Place, limit: int = 3) -> list[str]:
    """What makes the phase of the peak smaller, the largest part first."""
    _, phase = peak(parts, place)
    here = [part for part in parts if part.place == place and phase in part.phases and part.remedy and part.size]
    ordered = sorted(here, key=lambda part: -(part.size or 0))
    return list(dict.fromkeys(part.remedy for part in ordered))[:limit]
