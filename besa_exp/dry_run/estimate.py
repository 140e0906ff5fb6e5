"""What a run will need: bytes by part and place, seconds by part. NaN: not estimated.

Sizes come from the model's config: it is built without weights. Texts are read as the run reads them (`texts.py`). Time
is what was measured (`costs.py`) or counted (`chips.py`) times how often it is paid, and

    need(place) = max over phases of the sum of the place's parts in that phase.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from besa_exp.blocks.activations import OF_ALL_BLOCKS, activation_bytes
from besa_exp.blocks.probe import num_probe_samples
from besa_exp.checkpoints.load import SHARE_OF_FREE, is_to_stream, model_context, weight_bytes
from besa_exp.checkpoints.narrowed_model import costs_of_model
from besa_exp.checkpoints.streaming import saves_blocks_anew, streamed_sources
from besa_exp.checkpoints.structure import Costs as Parameters
from besa_exp.checkpoints.tensor_sources import stored_tensors
from besa_exp.dry_run.chips import CHIPS, counted
from besa_exp.dry_run.costs import BACKWARD, Costs, measured
from besa_exp.dry_run.sizes import ModelSize, local_folder, model_size, model_without_weights
from besa_exp.dry_run.texts import Texts, read_texts
from besa_exp.errors import ConfigurationError
from besa_exp.evaluation.streamed import HELD_BYTES
from besa_exp.machine.device import prepared_device
from besa_exp.machine.disk import ONE_FILE, existing
from besa_exp.machine.memory import free_memory
from besa_exp.methods.budgets.uniform import SameForAll
from besa_exp.methods.structure.method import CountedSearch
from besa_exp.methods.updates.updated import with_update
from besa_exp.recovery.recipe import follows_dense
from besa_exp.settings import RunSettings
from besa_exp.tensors.masks import Goal

Place = Literal["device", "host", "disk"]
PHASES = ("load", "prune", "refine", "recover", "save", "evaluate")
LIBRARIES = "Python and libraries"  # held by this process too: they do not lessen what is free
AT_WORK = "statistics, pruner and forward pass at work"
LOGS = 300_000  # bytes: config, environment, results, status, run.log, a line of metrics for each step
LARGER_DISK = "hydra.run.dir=DIR on a larger disk"
NO_SEARCH = "pruner=besa_reconstruct in the place of best, pruner.scope=block"
WANDB_TIMES = 4  # what W&B writes for each byte of them, its copy of the console included
REPLAYED = 4  # passes of a sample through each block when a run begins: two samples, twice
FRESH_PROCESS = 2.5  # seconds until Python has imported torch and transformers, as measured on two CPU cores


@dataclass(frozen=True)
class Part:
    """`size` bytes that a run holds at `place` during `phases`; `remedy` makes them fewer."""

    name: str
    place: Place
    size: float
    phases: tuple[str, ...] = PHASES
    remedy: str = ""


@dataclass(frozen=True)
class Estimate:
    """Of one run: its parts, the bytes it keeps, seconds by part, what is free at each place, remarks, and whether a
    finished run is there."""

    settings: RunSettings
    folder: Path
    device: str
    parts: list[Part]
    kept: float
    blocks: int
    seconds: dict[str, float]
    free: dict[Place, int]
    notes: list[str]
    finished: bool = False


def estimate(settings: RunSettings, folder: Path) -> Estimate:
    """What the run in `folder` would need. ConfigurationError: the run would be refused."""
    named, place, calibration = settings.device_name, existing(folder), settings.calibration
    device = prepared_device(settings) if named == "here" else torch.device("cuda")
    model = model_without_weights(settings.model, settings.offline)
    size, linked, free = model_size(model), not saves_blocks_anew(model), dict[Place, int]()
    parameters = costs_of_model(model) if isinstance(settings.structure, CountedSearch) else None
    if named == "here":
        if device.type == "cuda":
            free["device"] = torch.cuda.mem_get_info(device)[0]
        free["host"] = free_memory()
        streamed, notes = _is_streamed(settings, model, size, device)
        texts = read_texts(settings, model)
        costs = measured(settings, model, size, texts, place, device)
    else:
        free["device"] = CHIPS[named].memory
        streamed, notes = size.total > SHARE_OF_FREE * free["device"], []
        texts = Texts(calibration.num_samples, min(calibration.seq_len, model_context(model)))
        costs = counted(settings, model, size, texts.seq_len)
    free["disk"] = shutil.disk_usage(place).free
    linked = linked and (streamed or (size.total > ONE_FILE and settings.recovery is None))
    saved = (size.outside if linked else size.total) * settings.keeps_model
    parts = _parts(settings, size, texts, costs, streamed, saved, device.type == "cuda")
    parts += _refining(settings, size, texts, streamed, device.type == "cuda", free)
    searched = _searching(settings, parameters, texts, costs)
    seconds = _seconds(settings, size, texts, costs, searched, streamed, saved, device.type == "cuda")
    kept = size.total * settings.keeps_model + size.masks * settings.save.masks * (not settings.is_dense) + LOGS
    notes += [*texts.notes, *filter(None, [costs.note])]
    if not isinstance(settings.budget, SameForAll | None):
        notes.append("the memory of a budget over depth is not estimated")
    if settings.structure:
        notes.append("later stages are estimated as if the structure took nothing away")
    told = str(device) if named == "here" else named
    return Estimate(settings, folder, told, parts, kept, len(size.blocks), seconds, free, notes)


def _searching(settings: RunSettings, parameters: Parameters | None, texts: Texts, costs: Costs) -> float:
    """Seconds of the search for a structure; NaN: it does not say what it asks for."""
    if parameters is None or not isinstance(settings.structure, CountedSearch):
        return math.nan if settings.structure else 0.0
    work = settings.structure.work(parameters, texts.samples, settings.calibration.batch_size)
    return work.seconds_of_passes(texts.seq_len, *costs.token)


def _is_streamed(
    settings: RunSettings, model: PreTrainedModel, size: ModelSize, device: torch.device
) -> tuple[bool, list[str]]:
    """Whether the blocks will be read one at a time, as `load_model` decides it, and what is to be said."""
    folder = local_folder(settings.model)
    there = weight_bytes(folder) if folder else 0
    notes = [] if there else ["the weights are not on this machine: the run fetches them first, which is not counted"]
    if not is_to_stream(settings.model, there or size.total, device):
        return False, notes
    try:
        if folder and there:
            streamed_sources(model, stored_tensors(folder))
    except ValueError as error:
        if settings.model.load == "streamed":
            raise ConfigurationError(
                f"model.load=streamed: {settings.model.path} cannot be streamed ({error}); set model.load=whole"
            ) from error
        return False, [*notes, f"large, but loaded whole: {error}"]
    return True, notes


def _parts(
    settings: RunSettings, size: ModelSize, texts: Texts, costs: Costs, streamed: bool, saved: int, on_cuda: bool
) -> list[Part]:
    """The bytes of each part that there is. `saved`: of the saved model, those that are no links to finished blocks."""
    memory: Place = "device" if on_cuda else "host"
    at: Place = "disk" if costs.activations == "disk" else memory if costs.activations == "device" else "host"
    elsewhere = {"device": "activations=host or ", "host": "activations=disk or ", "disk": ""}[at]
    fewer = f"{elsewhere}a smaller calibration.num_samples or .seq_len"
    links = "save.model=false or model.load=streamed (which saves no block twice)" if saved == size.total else ""
    traits, pruned = with_update(settings.pruner, settings.update).traits, not settings.is_dense
    states = activation_bytes(texts.samples, texts.seq_len, size.state, 1, traits.dense_targets) * pruned
    scored = max((count * length for count, length in texts.windows), default=0) * size.state * streamed
    state, checkpoint, _, step = costs.recovery[1:] if settings.recovery else (0, 0, 0, 0)
    batch = costs.batch if settings.evaluator.perplexity_sets or settings.evaluator.tasks else 0
    follows = settings.recovery is not None and follows_dense(settings.recovery)
    tracked = settings.tracker.name == "wandb" and settings.tracker.mode != "disabled"
    held, finished = max(size.blocks) * streamed, (sum(size.blocks) + size.masks) * pruned
    loop = ("prune", "refine", "evaluate")
    parts = [
        Part(LIBRARIES, "host", costs.libraries),
        Part("weights", memory, size.total * (not streamed), remedy="model.load=streamed"),
        Part("weights outside the blocks", memory, size.outside * streamed),
        Part("weights of the block at work", memory, traits.blocks_together * held, loop, "pruner.scope=block"),
        Part("the next block, read ahead", "host", held, loop),
        Part("the finished block, being written", "host", held * pruned, ("prune",)),
        Part("a shard on its way", "host", min(saved, ONE_FILE) * on_cuda * (not streamed), ("save",)),
        Part("activations and targets", at, states, ("prune",), fewer),
        Part(AT_WORK, memory, costs.working if pruned else 0, ("prune", "refine"), "a smaller calibration.batch_size"),
        Part("recovery: what is trained, and its moments", memory, state, ("recover",), "recovery=lora"),
        Part("recovery: a step's activations, gradient", memory, step, ("recover",), "recovery.micro_batch=1"),
        Part("recovery: the dense model", memory, size.total * follows, ("recover",), "recovery.distill=none"),
        Part("evaluation: a batch's logits", memory, batch, ("evaluate",), "evaluator.batch_size=1"),
        Part("evaluation: hidden states", memory, scored, ("evaluate",)),
        Part("finished blocks and masks, until the run is done", "disk", finished, PHASES[1:], LARGER_DISK),
        Part("saved shards", "disk", saved, ("save", "evaluate"), links),
        Part("masks.safetensors", "disk", size.masks * settings.save.masks * pruned, ("save", "evaluate")),
        Part("recovery: two checkpoints and their best weights", "disk", 2 * checkpoint, ("recover",)),
        Part("logs and metrics", "disk", LOGS),
        Part("W&B", "disk", WANDB_TIMES * LOGS * tracked),
    ]  # fmt: skip
    return [part for part in parts if part.size != 0]


def _refining(
    settings: RunSettings, size: ModelSize, texts: Texts, streamed: bool, on_cuda: bool, free: Mapping[Place, int]
) -> list[Part]:
    """What a search over the whole model adds, from its first step to its last."""
    memory: Place = "device" if on_cuda else "host"
    sparsity, weights = Goal.parse(settings.sparsity, settings.pattern).sparsity, 8 * size.masks
    states = activation_bytes(texts.samples, texts.seq_len, size.state, 1, False)
    taken = {memory: states + (size.outside if streamed else size.total)}
    parts = []
    for one in settings.pruner.traits.refinements:
        fixed, movable = one.bytes_held(weights, sparsity)
        at: Place = "disk"
        for place in ("host", memory):  # the faster one last
            if movable < OF_ALL_BLOCKS * (free.get(place, 0) - taken.get(place, 0)):
                at = place
        parts += [
            Part("dense weights, until the search begins", memory, sum(size.blocks) * (not streamed), ("prune",)),
            Part("the search's hidden states", memory, states, ("refine",)),
            Part("the search: which weights", memory, fixed, ("refine",), NO_SEARCH),
            Part("the search: kept weights, moments", at, movable, ("refine",), NO_SEARCH),
            Part("blocks as the search leaves them", "disk", sum(size.blocks) + size.masks, PHASES[2:]),
        ]
    return [part for part in parts if part.size]


def _seconds(
    settings: RunSettings,
    size: ModelSize,
    texts: Texts,
    costs: Costs,
    searched: float,
    streamed: bool,
    saved: int,
    on_cuda: bool,
) -> dict[str, float]:
    """By the parts of results.json's `seconds`, whose `prune` is `prune` and `refine` here."""
    disk, blocks, count, masks = costs.disk, sum(size.blocks), len(size.blocks), size.masks * settings.save.masks
    load = (size.outside if streamed else size.total) * disk.read
    tokens = sum(windows * length for windows, length in [*texts.windows, *texts.requests])
    # A streamed model's blocks are read once a set, and once for the questions that HELD_BYTES hold.
    held = [math.ceil(asked * length * size.state / HELD_BYTES) for asked, length in texts.requests]
    read = texts.read + blocks * disk.read * (len(texts.windows) + sum(held)) * streamed
    evaluated = read + (tokens and tokens * (costs.token[0] * count + costs.token[1]))
    if settings.is_dense:
        return {"load": load, "evaluate": evaluated, "total": load + evaluated}
    # Each in a thread of its own: the next block, streamed, is read and hashed; the finished one is written and hashed.
    ahead = blocks * (disk.read * streamed + disk.hash) / count
    behind = (size.masks * disk.keep + blocks * (disk.write + disk.hash)) / count
    a_block = max(costs.block, ahead, behind) if on_cuda else costs.block + ahead + behind
    save = masks * (disk.write + disk.read)
    if settings.keeps_model:  # written, its zeros counted, loaded again, and by a fresh process beside scoring
        apart = max(0.0, FRESH_PROCESS + size.total * disk.read - evaluated) * settings.save.verify
        save += saved * disk.write + 2 * blocks * disk.read + load + apart
    checked = REPLAYED * texts.seq_len * costs.token[0]
    seconds = {"load": load, "calibrate": texts.calibrate}
    if settings.structure is not None:
        seconds["structure"] = searched
    seconds["prune"] = costs.budget + count * (a_block + checked)
    if settings.pruner.traits.refinements:
        seconds["refine"] = _refining_seconds(settings, size, texts, costs)
    if settings.recovery:
        seconds["recover"] = costs.recovery.seconds + costs.recovery.written * disk.keep
    models = 1 + settings.evaluator.dense + (settings.recovery is not None)  # the dense one, and the one before tuning
    seconds |= {"save": save, "evaluate": evaluated * models}
    return seconds | {"total": sum(seconds.values())}


def peak(parts: Sequence[Part], place: Place) -> tuple[float, str]:
    """The most that `place` must hold at once, and in which phase; parts that are not estimated count nothing."""
    sums = {
        phase: sum(part.size for part in parts if part.place == place and phase in part.phases and part.size >= 0)
        for phase in PHASES
    }
    phase = max(PHASES, key=sums.__getitem__)
    return sums[phase], phase


def remedies(parts: Sequence[Part], place: Place) -> list[str]:
    """Up to three ways to make the phase of the peak smaller, the largest part first."""
    _, phase = peak(parts, place)
    here = [part for part in parts if part.place == place and phase in part.phases and part.remedy and part.size > 0]
    return list(dict.fromkeys(part.remedy for part in sorted(here, key=lambda part: -part.size)))[:3]


def _refining_seconds(settings: RunSettings, size: ModelSize, texts: Texts, costs: Costs) -> float:
    """Of the searches over the whole model: their passes, those of the dense model before and of the probe samples
    after, when each block is written again. A block that is differentiated is passed once more."""
    refinements = settings.pruner.traits.refinements
    asked = [one.passes(texts.samples) for one in refinements]
    plain, judged, learned = (sum(counts) for counts in zip(*asked, strict=True))
    plain += len(refinements) * texts.samples + 2 * num_probe_samples(texts.samples)
    of_blocks, of_predictions = plain + judged + (1 + BACKWARD) * learned, 2 * judged + (1 + BACKWARD) * learned
    tokens = of_blocks * costs.token[0] * len(size.blocks) + of_predictions * costs.token[1]
    return texts.seq_len * tokens + (sum(size.blocks) + size.masks) * costs.disk.keep
