"""What a run will need: bytes by part and place, seconds by part.

Sizes come from the model's config: it is built without weights. Texts are read as the run reads them (`texts.py`). One
block is pruned, a batch goes through it and the head, and a file is written beside the run folder (`probe.py`). A part
is held during some phases, and a place must hold

    need(place) = max over phases of the sum of the place's parts in that phase.

Time is what was measured times how often it is paid.
"""

from __future__ import annotations

import importlib
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import psutil
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from besa_exp.blocks.activations import activation_bytes, allocator
from besa_exp.blocks.block import discover_blocks, discover_linears
from besa_exp.blocks.head import head_of
from besa_exp.blocks.observation import Observed
from besa_exp.blocks.pruner import Pruner
from besa_exp.checkpoints.files import weights_sha256
from besa_exp.checkpoints.load import SHARE_OF_FREE, is_large, model_context, weight_bytes
from besa_exp.checkpoints.streaming import cannot_stream, give_back_memory, saves_blocks_anew
from besa_exp.checkpoints.tensor_sources import stored_tensors
from besa_exp.dry_run.counts import CHIPS, DISK, HASH, block_seconds, passes_of
from besa_exp.dry_run.probe import BlockCost, BlockProbe, PeakMemory, cut_down, seconds_of
from besa_exp.dry_run.recovery import RecoveryCost, recovery_cost
from besa_exp.dry_run.texts import Texts, local_folder, model_without_weights, read_texts
from besa_exp.errors import ConfigurationError, RunError, first_line
from besa_exp.evaluation.batches import rows_at_once, tokens_at_once
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.evaluation.streamed import HELD_BYTES
from besa_exp.machine import atomic
from besa_exp.machine.device import compute_dtype, prepared_device
from besa_exp.machine.memory import free_memory
from besa_exp.methods.budgets.budget import Budget, pruned_to
from besa_exp.methods.budgets.trial import DepthSearch
from besa_exp.methods.updates.updated import with_update
from besa_exp.recovery.recipe import follows_dense
from besa_exp.settings import RunSettings
from besa_exp.tensors.importance import importance_of
from besa_exp.tensors.masks import Goal

Place = Literal["device", "host", "disk"]
Phase = Literal["load", "prune", "recover", "save", "evaluate"]
PHASES: tuple[Phase, ...] = ("load", "prune", "recover", "save", "evaluate")
SHARD_BYTES = 5 * 10**9  # transformers' own, and `files.SHARD_SIZE`
LIBRARIES = "Python and libraries"  # held by this process too: they do not lessen what is free
LEAST_WORK = 3  # blocks that a probe on a CPU needs at least
SLOW = 1.0  # seconds that an evaluation's batch may take; a smaller one is measured where it takes longer
STEP_BYTES = 170  # a line of metrics.jsonl for a step (seen: 150 to 165)
LINEAR_BYTES = 400  # a linear's part of a block's line, of its report and of sparsity.csv
BASE_LOG_BYTES = 200_000  # config, environment, results, status, run.log, and W&B's own start
WANDB_TIMES = 4  # what W&B writes for each byte of metrics.jsonl, its copy of the console included
REPLAYED = 4  # passes of a sample through the model when a run begins: two samples, twice
FRESH_PROCESS = 2.5  # seconds until Python has imported torch and transformers, as measured on two CPU cores
SMALL, LARGE = 2**16, 2**25  # bytes of the files that are written to measure the disk


@dataclass(frozen=True)
class Part:
    """`size` bytes (None: not estimated) that a run holds at `place` during `phases`; `remedy` makes them fewer."""

    name: str
    place: Place
    size: int | None
    phases: tuple[Phase, ...] = PHASES
    remedy: str = ""


@dataclass(frozen=True)
class Estimate:
    """Of one run: its parts, the bytes it keeps, seconds by part (None: not estimated), what is free at each place,
    remarks, and whether a finished run is there."""

    settings: RunSettings
    folder: Path
    device: torch.device
    parts: list[Part]
    kept: int
    blocks: int
    seconds: dict[str, float | None]
    free: dict[Place, int]
    notes: list[str]
    finished: bool = False


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model as it is computed with and saved: of each block, of what is outside them (tied weights once), of
    a mask of every linear at one bit a weight, and of a token's hidden state; and how many linears there are."""

    blocks: list[int]
    outside: int
    masks: int
    state: int
    linears: int

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return sum(self.blocks) + self.outside


@dataclass(frozen=True)
class Measured:
    """What probes found; None: could not be measured. `budget`: seconds of a budget over depth. `token`: seconds of a
    token that is scored, in a block and outside the blocks; `batch_bytes`: what a scored batch holds."""

    libraries: int
    activations_at: str
    block: BlockCost | None = None
    budget: float | None = 0.0
    token: tuple[float, float] = (0.0, 0.0)
    batch_bytes: int | None = None
    recovery: RecoveryCost | None = None
    note: str = ""


@dataclass(frozen=True)
class DiskSpeed:
    """Seconds a file however small, and seconds a byte to write it durably, to read it, to hash it."""

    file: float
    write: float
    read: float
    hash: float


def estimate(settings: RunSettings, folder: Path, on_progress: Callable[[str], None] = lambda text: None) -> Estimate:
    """What the run in `folder` would need. `on_progress` is called with what is done next. ConfigurationError: the run
    would be refused."""
    if settings.device_name != "here":
        on_progress("counting what the run computes")
        return estimate_from_counts(settings, folder)
    device = prepared_device(settings)
    on_progress("building the model without weights, reading the texts")
    models: list[PreTrainedModel] = []
    build = seconds_of(device, lambda: models.append(model_without_weights(settings.model, settings.offline)))
    (model,), links = models, not saves_blocks_anew(models[0])
    size = model_size(model)
    streamed, notes = _is_streamed(settings, model, size, device)
    texts = read_texts(settings, model)
    place = _existing(folder)
    free: dict[Place, int] = {"host": free_memory(), "disk": shutil.disk_usage(place).free}
    free |= {"device": torch.cuda.mem_get_info(device)[0]} if device.type == "cuda" else {}
    on_progress("writing a file and reading it again")
    disk = disk_speed(place)
    on_progress(f"pruning one block of random weights on {device}")
    found = _measured(settings, model, size, texts, place, device)
    saved_anew = 0 if not settings.keeps_model else size.outside if streamed and links else size.total
    parts = [
        *_memory_parts(settings, size, texts, found, streamed, device),
        *_disk_parts(settings, size, found, saved_anew),
    ]
    seconds = _seconds(settings, size, texts, found, disk, build, streamed, saved_anew)
    logs = sum(part.size or 0 for part in parts if part.name in ("logs and metrics", "W&B"))
    kept = size.total * settings.keeps_model + size.masks * settings.save.masks * (not settings.is_dense) + logs
    notes += [*texts.notes, *filter(None, [found.note]), *_not_estimated(settings, found)]
    return Estimate(settings, folder, device, parts, kept, len(size.blocks), seconds, free, notes)


def estimate_from_counts(settings: RunSettings, folder: Path) -> Estimate:
    """Of loading, pruning and saving on the chip `settings.device_name`, which need not be here."""
    chip, calibration = CHIPS[settings.device_name], settings.calibration
    model = model_without_weights(settings.model, settings.offline)
    size, pruner = model_size(model), with_update(settings.pruner, settings.update)
    streamed = size.total > SHARE_OF_FREE * chip.memory
    goal, samples = Goal.parse(settings.sparsity, settings.pattern), calibration.num_samples
    length = min(calibration.seq_len, model_context(model))
    passes = passes_of(pruner, goal, samples, calibration.batch_size)
    weights, block = 8 * size.masks // len(size.blocks), sum(size.blocks) // len(size.blocks)
    host = (block + weights / 8) / DISK + block / HASH
    a_block = max(block_seconds(chip, pruner, passes, model.config, weights, samples, length), host)
    written = size.outside if streamed else size.total
    load, save = written / DISK, (written + 2 * size.total) / DISK * settings.keeps_model
    seconds: dict[str, float | None] = {"load": load, "prune": a_block * len(size.blocks), "one block": a_block}
    seconds |= {"save": save, "total": load + a_block * len(size.blocks) + save}
    held = size.outside + (1 + pruner.traits.blocks_together) * block if streamed else size.total
    states = Measured(0, "device")
    parts = [Part("weights", "device", held), *_pruning_parts(pruner, samples * length * size.state, states, "device")]
    parts += _disk_parts(settings, size, states, written * settings.keeps_model)
    kept = size.total * settings.keeps_model + size.masks * settings.save.masks
    notes = [
        f"an estimate from counts for {settings.device_name}, on which nothing was measured: a sample passes a block "
        f"{passes.plain / samples:.2f} times without and {passes.differentiated / samples:.2f} times with a gradient",
        "fetching, calibration text and scoring are not counted; a disk of 2 GB/s and hashes of 1.3 GB/s are assumed",
    ]
    free: dict[Place, int] = {"device": int(chip.memory), "disk": shutil.disk_usage(_existing(folder)).free}
    return Estimate(settings, folder, torch.device("cuda"), parts, kept, len(size.blocks), seconds, free, notes)


def _not_estimated(settings: RunSettings, found: Measured) -> list[str]:
    over_depth = isinstance(settings.budget, DepthSearch | Budget)
    notes = ["the memory of a budget over depth is not estimated"] if over_depth else []
    if settings.structure is not None:
        notes.append("the structure is not estimated: time and memory are those of the dense model's blocks")
    if settings.pruner.traits.refinements:
        notes.append("time and memory of the search over the whole model that follows the block loop are not estimated")
    if settings.recovery:
        notes.append("of the recovery's memory, the activations of a step are not estimated")
    return notes


def model_size(model: PreTrainedModel) -> ModelSize:
    """Bytes of a model without weights."""
    modules, itemsize = discover_blocks(model)[1], model.dtype.itemsize
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    linears = [linear.weight.numel() for module in modules for linear in discover_linears(module).values()]
    return ModelSize(
        blocks=[itemsize * sum(value.numel() for value in module.state_dict().values()) for module in modules],
        outside=itemsize * sum(count for key, count in unique.items() if key not in inside),
        masks=sum(-(-count // 8) for count in linears),
        state=itemsize * model.config.get_text_config().hidden_size,
        linears=len(linears),
    )


def _is_streamed(
    settings: RunSettings, model: PreTrainedModel, size: ModelSize, device: torch.device
) -> tuple[bool, list[str]]:
    """Whether the blocks will be read one at a time, as `load_model` decides it, and what is to be said."""
    wanted, folder = settings.model.load, local_folder(settings.model)
    there = weight_bytes(folder) if folder else 0
    notes = [] if there else ["the weights are not on this machine: the run fetches them first, which is not counted"]
    if wanted == "whole" or (wanted == "auto" and not is_large(there or size.total, device)):
        return False, notes
    reason = cannot_stream(model, stored_tensors(folder)) if folder and there else None
    if reason is None:
        return True, notes
    if wanted == "streamed":
        raise ConfigurationError(
            f"model.load=streamed: {settings.model.path} cannot be streamed ({reason}); set model.load=whole"
        )
    return False, [*notes, f"large, but loaded whole: {reason}"]


def _measured(
    settings: RunSettings, model: PreTrainedModel, size: ModelSize, texts: Texts, place: Path, device: torch.device
) -> Measured:
    pruner, evaluator = with_update(settings.pruner, settings.update), settings.evaluator
    for used, module in ((settings.tracker.name == "wandb", "wandb"), (evaluator.tasks, "lm_eval.models.huggingface")):
        if used:
            importlib.import_module(module)  # so that this process holds what a run holds
    states = activation_bytes(texts.samples, texts.seq_len, size.state, 1, pruner.traits.dense_targets)
    where, allocate = allocator(settings.activations, device, place, states)
    give_back_memory()
    unmeasured = partial(Measured, psutil.Process().memory_info().rss, where)
    together = pruner.traits.blocks_together
    if device.type == "cpu" and LEAST_WORK * together * max(size.blocks) + size.outside > free_memory():
        return unmeasured(note="time and working memory are not estimated: one block needs more memory")
    goal = Goal.parse(settings.sparsity, settings.pattern)
    try:
        cut, batch_size = cut_down(model, device, together), settings.calibration.batch_size
        probe = BlockProbe(cut, device, pruner, goal, batch_size, allocate, compute_dtype(settings))
        block = probe.cost(texts.samples, texts.seq_len)
        budget = _budget_seconds(probe, settings, texts, len(size.blocks))
        scores = bool(evaluator.perplexity_sets or evaluator.tasks)
        token, held = _scoring(probe, texts, evaluator.batch_size) if scores else ((0.0, 0.0), 0)
        asked = settings.recovery
        length = (asked.seq_len or texts.seq_len) if asked else 0
        recovery = recovery_cost(probe, asked, length, len(size.blocks)) if asked else None
        return unmeasured(block=block, budget=budget, token=token, batch_bytes=held, recovery=recovery)
    except torch.OutOfMemoryError:
        return unmeasured(note="time and working memory are not estimated: one block did not fit")
    except RunError:
        raise
    except RuntimeError as error:  # as of a block that takes no other one's arguments
        return unmeasured(note=f"time and working memory are not estimated: {first_line(error)}")


def _budget_seconds(probe: BlockProbe, settings: RunSettings, texts: Texts, num_blocks: int) -> float:
    """Of a budget over depth: its passes, counted, and what it does besides with a block's weights; of a search over
    whole models what it says it will ask for, at most."""
    budget, sparsity, length = settings.budget, probe.goal.sparsity, min(texts.seq_len, 256)
    a_token = probe.forward_seconds(1, length) / length
    block, hidden = probe.block_of_noise(1, length)
    if isinstance(budget, DepthSearch):
        work = budget.work(num_blocks, texts.samples, texts.seq_len, sparsity)
        head = head_of(probe.model, block.layers, torch.zeros(1, length, dtype=torch.int64))
        a_head = min(seconds_of(probe.device, lambda: _compared(head(hidden))) for _ in range(2)) / length
        observed, _ = Observed.of(importance_of(budget.importance), block, hidden, 1)
        a_pass = seconds_of(probe.device, lambda: [*pruned_to(block, observed, [sparsity])]) / len(block.layers)
        return num_blocks * (work.passes * a_pass + work.tokens * a_token) + work.tokens * a_head
    if not isinstance(budget, Budget):
        return 0.0
    ask = partial(budget.sparsities, sparsity=sparsity, batch_size=probe.batch_size)
    passes = probe.passes(ask, num_blocks, texts.samples)
    besides = seconds_of(probe.device, lambda: ask(block.layers[:1], hidden)) - length * a_token
    return passes * texts.seq_len * a_token + num_blocks * max(0.0, besides)


def _compared(logits: torch.Tensor) -> float:
    """What a divergence takes besides the logits."""
    found = logits.float().log_softmax(dim=-1)
    return float((found.exp() * (found - found)).sum(dim=-1).double().sum())


def _scoring(probe: BlockProbe, texts: Texts, batch_size: int | str) -> tuple[tuple[float, float], int]:
    """Seconds of a scored token in a block and outside, and the bytes of a batch, weights not counted: measured on a
    batch of the run, or on a part of it on a slow device."""
    window = max((length for _, length in texts.windows), default=min(512, texts.seq_len))
    rows = rows_at_once(tokens_at_once(probe.model), window) if batch_size == "auto" else int(batch_size)

    def batch(count: int, length: int) -> float:
        ids = torch.zeros(count, length, dtype=torch.int64)
        return seconds_of(probe.device, lambda: perplexity(probe.model, ids, length, count))

    tried, length = 1, min(window, 128)
    slowness = batch(tried, length) / length
    if slowness * rows * window <= SLOW:
        tried, length = rows, window
    else:
        length = min(window, max(length, int(SLOW / slowness)))
    give_back_memory()
    with PeakMemory(probe.device) as memory:
        before = memory.now()
        whole = min(batch(tried, length) for _ in range(2))
        held = max(0, memory.peak() - before)
    in_block, tokens = probe.forward_seconds(tried, length), tried * length
    outside = max(0.0, whole - in_block * len(discover_blocks(probe.model)[1]))
    return (in_block / tokens, outside / tokens), held * rows * window // tokens


def _memory_parts(
    settings: RunSettings, size: ModelSize, texts: Texts, found: Measured, streamed: bool, device: torch.device
) -> list[Part]:
    memory: Place = "device" if device.type == "cuda" else "host"
    pruner = with_update(settings.pruner, settings.update)
    parts = [Part(LIBRARIES, "host", found.libraries)]
    largest, on_cuda = max(size.blocks), device.type == "cuda"
    if streamed:
        parts.append(Part("weights outside the blocks", memory, size.outside))
        held = pruner.traits.blocks_together * largest
        parts.append(Part("weights of the block at work", memory, held, ("prune", "evaluate"), "pruner.scope=block"))
        parts.append(Part("the next block, read ahead", "host", largest, ("prune", "evaluate")))
        parts.append(Part("the finished block, being written", "host", largest, ("prune",)))
    else:
        parts.append(Part("weights", memory, size.total, remedy="model.load=streamed"))
        parts += [Part("a shard on its way", "host", min(size.total, SHARD_BYTES), ("save",))] * on_cuda
    if settings.is_dense:
        parts = [part for part in parts if "load" in part.phases or "evaluate" in part.phases]
    else:
        parts += _pruning_parts(pruner, texts.samples * texts.seq_len * size.state, found, memory)
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


def _pruning_parts(pruner: Pruner, states: int, found: Measured, memory: Place) -> list[Part]:
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


def _disk_parts(settings: RunSettings, size: ModelSize, found: Measured, saved_anew: int) -> list[Part]:
    parts: list[Part] = []
    after: tuple[Phase, ...] = ("prune", "recover", "save", "evaluate")
    if not settings.is_dense:
        kept = sum(size.blocks) + size.masks
        parts.append(Part("finished blocks and masks, until the run is done", "disk", kept, after))
    if settings.keeps_model:
        less = "save.model=false or model.load=streamed (which saves no block twice)"
        parts.append(Part("saved shards", "disk", saved_anew, ("save", "evaluate"), less))
    if settings.save.masks and not settings.is_dense:
        parts.append(Part("masks.safetensors", "disk", size.masks, ("save", "evaluate")))
    if settings.recovery:
        cost = found.recovery
        states = 2 * (cost.state_bytes + cost.moved_bytes) if cost else None
        parts.append(Part("recovery: two checkpoints and their best weights", "disk", states, ("recover",)))
    steps = round(found.block.steps * len(size.blocks)) if found.block else 0
    logs = BASE_LOG_BYTES + steps * STEP_BYTES + size.linears * LINEAR_BYTES
    parts.append(Part("logs and metrics", "disk", logs))
    if settings.tracker.name == "wandb" and settings.tracker.mode != "disabled":
        parts.append(Part("W&B", "disk", WANDB_TIMES * logs))
    return parts


def _seconds(
    settings: RunSettings,
    size: ModelSize,
    texts: Texts,
    found: Measured,
    disk: DiskSpeed,
    build: float,
    streamed: bool,
    saved_anew: int,
) -> dict[str, float | None]:
    """Seconds by the parts of results.json's `seconds`, with one block's; None: not estimated."""
    load = build + (size.outside if streamed else size.total) * disk.read
    scores = bool(texts.windows or texts.requests)
    models = 2 if settings.evaluator.dense and not settings.is_dense else 1
    known = found.block is not None and texts.read is not None
    evaluated = (_evaluation_seconds(size, texts, found, disk, streamed) if scores else 0.0) if known else None
    seconds: dict[str, float | None] = {"load": load}
    if not settings.is_dense:
        a_block = _block_seconds(size, found.block, disk, streamed) if found.block else None
        replayed = REPLAYED * (1 if streamed else len(size.blocks))
        begin = (found.budget or 0.0) + replayed * found.block.forward_seconds if found.block else 0.0
        pruning = None if a_block is None else begin + a_block * len(size.blocks)
        save = _save_seconds(settings, size, disk, load, saved_anew, evaluated or 0.0)
        seconds |= {"calibrate": texts.calibrate, "prune": pruning, "one block": a_block}
        seconds |= {"recover": _recovery_seconds(found.recovery, disk)} if settings.recovery else {}
        seconds |= {"save": save}
    seconds["evaluate"] = None if evaluated is None else models * evaluated
    parts = [value for part, value in seconds.items() if part != "one block"]
    return {**seconds, "total": None if None in parts else sum(filter(None, parts))}


def _recovery_seconds(cost: RecoveryCost | None, disk: DiskSpeed) -> float | None:
    """Its steps, and the files that are written and hashed each time held-out windows have judged."""
    if cost is None:
        return None
    written = (cost.state_bytes + cost.moved_bytes) * (disk.write + 2 * disk.hash)
    return cost.seconds + cost.checkpoints * (3 * disk.file + written)


def _block_seconds(size: ModelSize, block: BlockCost, disk: DiskSpeed, streamed: bool) -> float:
    """Pruning, and what makes it last: two hashes of the weights, three files; a streamed block is read first."""
    weights, masks = sum(size.blocks) // len(size.blocks), size.masks // len(size.blocks)
    kept = 3 * disk.file + (weights + masks) * disk.write + (2 * weights + masks) * disk.hash
    return block.seconds + kept + weights * disk.read * streamed


def _save_seconds(
    settings: RunSettings, size: ModelSize, disk: DiskSpeed, load: float, saved_anew: int, scoring: float
) -> float:
    """Masks in one file; the model written, its zeros counted, loaded again, and by a fresh process beside scoring."""
    seconds = (disk.file + size.masks * (disk.write + disk.read)) * settings.save.masks
    if settings.keeps_model:
        seconds += 5 * disk.file + saved_anew * disk.write + 2 * sum(size.blocks) * disk.read + load
        apart = FRESH_PROCESS + size.total * disk.read
        seconds += max(0.0, apart - scoring) * settings.save.verify
    return seconds


def _evaluation_seconds(size: ModelSize, texts: Texts, found: Measured, disk: DiskSpeed, streamed: bool) -> float:
    """Of one model. A streamed one's blocks are read once a set, and once for the questions that HELD_BYTES hold."""
    asked = sum(count * length for count, length in texts.requests)
    tokens = asked + sum(count * length for count, length in texts.windows)
    reads = len(texts.windows) + sum(math.ceil(n * length * size.state / HELD_BYTES) for n, length in texts.requests)
    in_block, outside = found.token
    seconds = (texts.read or 0.0) + tokens * (in_block * len(size.blocks) + outside)
    return seconds + sum(size.blocks) * disk.read * reads * streamed


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place


def disk_speed(place: Path) -> DiskSpeed:
    """Of the disk of `place`. Reading comes from the system's cache, as of files that were just written; a cold disk
    takes longer."""
    clock = torch.device("cpu")
    with tempfile.TemporaryDirectory(dir=place, prefix=".besa-probe-") as folder:
        path = Path(folder, "probe.safetensors")
        drawn = torch.randint(-(2**62), 2**62, (LARGE // 8,)).view(torch.uint8)  # what no file system makes smaller

        def write(size: int) -> None:
            with atomic.replaced_file(path) as partial_file:
                save_file({"probe": drawn[:size]}, partial_file)

        small = min(seconds_of(clock, lambda: write(SMALL)) for _ in range(3))
        large = min(seconds_of(clock, lambda: write(LARGE)) for _ in range(2))
        tensors = load_file(path)
        read = seconds_of(clock, load_file(path)["probe"].clone)
        hashed = seconds_of(clock, lambda: weights_sha256(tensors))
    return DiskSpeed(small, max(0.0, large - small) / LARGE, read / LARGE, hashed / LARGE)


def peak(parts: Sequence[Part], place: Place) -> tuple[int, Phase]:
    """The most that `place` must hold at once, and in which phase; parts that are not estimated count nothing."""
    sums = {
        phase: sum(part.size or 0 for part in parts if part.place == place and phase in part.phases) for phase in PHASES
    }
    phase = max(PHASES, key=sums.__getitem__)
    return sums[phase], phase


def remedies(parts: Sequence[Part], place: Place, limit: int = 3) -> list[str]:
    """What makes the phase of the peak smaller, the largest part first."""
    _, phase = peak(parts, place)
    here = [part for part in parts if part.place == place and phase in part.phases and part.remedy and part.size]
    return list(dict.fromkeys(part.remedy for part in sorted(here, key=lambda part: -(part.size or 0))))[:limit]
