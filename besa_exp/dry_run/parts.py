"""The bytes of a run: parts that it holds at a place during some of its phases, and what a place must hold.

need(place) = max over phases of the sum of the place's parts in that phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from besa_exp.blocks.pruner import Pruner
from besa_exp.dry_run.measured import Measured
from besa_exp.dry_run.sizes import ModelSize
from besa_exp.dry_run.texts import Texts
from besa_exp.machine.disk import ONE_FILE
from besa_exp.methods.updates.updated import with_update
from besa_exp.recovery.recipe import follows_dense
from besa_exp.settings import RunSettings

Place = Literal["device", "host", "disk"]
Phase = Literal["load", "prune", "recover", "save", "evaluate"]
PHASES: tuple[Phase, ...] = ("load", "prune", "recover", "save", "evaluate")
LIBRARIES = "Python and libraries"  # held by this process too: they do not lessen what is free
LOGS = ("logs and metrics", "W&B")
STEP_BYTES = 170  # a line of metrics.jsonl for a step (seen: 150 to 165)
LINEAR_BYTES = 400  # a linear's part of a block's line, of its report and of sparsity.csv
BASE_LOG_BYTES = 200_000  # config, environment, results, status, run.log, and W&B's own start
WANDB_TIMES = 4  # what W&B writes for each byte of metrics.jsonl, its copy of the console included


@dataclass(frozen=True)
class Part:
    """`size` bytes (None: not estimated) that a run holds at `place` during `phases`; `remedy` makes them fewer."""

    name: str
    place: Place
    size: int | None
    phases: tuple[Phase, ...] = PHASES
    remedy: str = ""


def memory_parts(
    settings: RunSettings, size: ModelSize, texts: Texts, found: Measured, streamed: bool, on_cuda: bool
) -> list[Part]:
    """What the device's and the host's memory hold."""
    memory: Place = "device" if on_cuda else "host"
    pruner, largest = with_update(settings.pruner, settings.update), max(size.blocks)
    parts = [Part(LIBRARIES, "host", found.libraries)]
    if streamed:
        held = pruner.traits.blocks_together * largest
        parts += [
            Part("weights outside the blocks", memory, size.outside),
            Part("weights of the block at work", memory, held, ("prune", "evaluate"), "pruner.scope=block"),
            Part("the next block, read ahead", "host", largest, ("prune", "evaluate")),
            Part("the finished block, being written", "host", largest, ("prune",)),
        ]
    else:
        parts.append(Part("weights", memory, size.total, remedy="model.load=streamed"))
        parts += [Part("a shard on its way", "host", min(size.total, ONE_FILE), ("save",))] * on_cuda
    if settings.is_dense:
        parts = [part for part in parts if "load" in part.phases or "evaluate" in part.phases]
    else:
        parts += pruning_parts(pruner, texts.samples * texts.seq_len * size.state, found, memory)
    if settings.recovery:
        held = found.recovery.state_bytes if found.recovery else None
        parts.append(Part("recovery: what is trained, and its moments", memory, held, ("recover",), "recovery=lora"))
        if follows_dense(settings.recovery):
            parts.append(Part("recovery: the dense model", memory, size.total, ("recover",), "recovery.distill=none"))
    if settings.evaluator.perplexity_sets or settings.evaluator.tasks:
        remedy = "evaluator.batch_size=1"
        parts.append(Part("evaluation: a batch's logits", memory, found.batch_bytes, ("evaluate",), remedy))
        if streamed and texts.windows:
            tokens = max(count * length for count, length in texts.windows)
            parts.append(Part("evaluation: hidden states", memory, tokens * size.state, ("evaluate",)))
    return parts


def pruning_parts(pruner: Pruner, states: int, found: Measured, memory: Place) -> list[Part]:
    """`states`: bytes of all samples' hidden states."""
    at = cast(Place, found.activations_at if memory == "device" or found.activations_at == "disk" else "host")
    fewer = "a smaller calibration.num_samples or .seq_len"
    elsewhere = {"device": "activations=host or ", "host": "activations=disk or ", "disk": ""}[at]
    rooms = (4 if pruner.traits.dense_targets else 2) + pruner.traits.own_targets
    working = found.block.working_bytes if found.block else None
    smaller = "a smaller calibration.batch_size"
    return [
        Part("activations and targets", at, rooms * states, ("prune",), elsewhere + fewer),
        Part("statistics, pruner and forward pass at work", memory, working, ("prune",), smaller),
    ]


def disk_parts(settings: RunSettings, size: ModelSize, found: Measured, saved_anew: int) -> list[Part]:
    """What the run folder holds; `saved_anew`: bytes of the saved model that are no links."""
    parts: list[Part] = []
    if not settings.is_dense:
        finished = "finished blocks and masks, until the run is done"
        parts.append(Part(finished, "disk", sum(size.blocks) + size.masks, PHASES[1:]))
    if settings.keeps_model:
        less = "save.model=false or model.load=streamed (which saves no block twice)"
        parts.append(Part("saved shards", "disk", saved_anew, ("save", "evaluate"), less))
    if settings.save.masks and not settings.is_dense:
        parts.append(Part("masks.safetensors", "disk", size.masks, ("save", "evaluate")))
    if settings.recovery:
        states = 2 * found.recovery.kept_bytes if found.recovery else None
        parts.append(Part("recovery: two checkpoints and their best weights", "disk", states, ("recover",)))
    steps = round(found.block.steps * len(size.blocks)) if found.block else 0
    logs = BASE_LOG_BYTES + steps * STEP_BYTES + size.linears * LINEAR_BYTES
    parts.append(Part(LOGS[0], "disk", logs))
    if settings.tracker.name == "wandb" and settings.tracker.mode != "disabled":
        parts.append(Part(LOGS[1], "disk", WANDB_TIMES * logs))
    return parts


def peak(parts: Sequence[Part], place: Place) -> tuple[int, Phase]:
    """The most that `place` must hold at once, and in which phase; parts that are not estimated count nothing."""
    sums = {
        phase: sum(part.size or 0 for part in parts if part.place == place and phase in part.phases) for phase in PHASES
    }
    phase = max(PHASES, key=sums.__getitem__)
    return sums[phase], phase


def remedies(parts: Sequence[Part], place: Place) -> list[str]:
    """Up to three ways to make the phase of the peak smaller, the largest part first."""
    _, phase = peak(parts, place)
    here = [part for part in parts if part.place == place and phase in part.phases and part.remedy and part.size]
    return list(dict.fromkeys(part.remedy for part in sorted(here, key=lambda part: -(part.size or 0))))[:3]
