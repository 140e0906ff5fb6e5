"""What a run will need: bytes by part and place, seconds by part.

Sizes come from the model's config: it is built without weights. Texts are read as the run reads them (`texts.py`). One
block is pruned, a batch goes through it and the head, and a file is written beside the run folder (`measured.py`).
Time is what was measured times how often it is paid.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from besa_exp.checkpoints.files import weights_sha256
from besa_exp.checkpoints.load import SHARE_OF_FREE, is_to_stream, model_context, weight_bytes
from besa_exp.checkpoints.streaming import saves_blocks_anew, streamed_sources
from besa_exp.checkpoints.tensor_sources import stored_tensors
from besa_exp.dry_run.counts import CHIPS, DISK, HASH, block_seconds, passes_of
from besa_exp.dry_run.measured import Measured, measured
from besa_exp.dry_run.parts import LOGS, Part, Place, disk_parts, memory_parts, pruning_parts
from besa_exp.dry_run.sizes import ModelSize, local_folder, model_size, model_without_weights
from besa_exp.dry_run.texts import Texts, read_texts
from besa_exp.errors import ConfigurationError
from besa_exp.evaluation.streamed import HELD_BYTES
from besa_exp.machine import atomic
from besa_exp.machine.device import prepared_device, seconds_of
from besa_exp.machine.disk import ONE_FILE, existing
from besa_exp.machine.memory import free_memory
from besa_exp.methods.budgets.budget import Budget
from besa_exp.methods.budgets.trial import DepthSearch
from besa_exp.methods.updates.updated import with_update
from besa_exp.settings import RunSettings
from besa_exp.tensors.masks import Goal

REPLAYED = 4  # passes of a sample through the model when a run begins: two samples, twice
FRESH_PROCESS = 2.5  # seconds until Python has imported torch and transformers, as measured on two CPU cores
SMALL, LARGE = 2**16, 2**25  # bytes of the files that are written to measure the disk


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
class DiskSpeed:
    """Seconds a file however small, and seconds a byte to write it durably, to read it, to hash it."""

    file: float
    write: float
    read: float
    hash: float

    def keeping(self, files: int, written: int, hashed: int) -> float:
        """Seconds to make so many bytes last, in so many files."""
        return files * self.file + written * self.write + hashed * self.hash


def estimate(settings: RunSettings, folder: Path, on_progress: Callable[[str], None] = lambda text: None) -> Estimate:
    """What the run in `folder` would need. `on_progress` is called with what is done next. ConfigurationError: the run
    would be refused."""
    if settings.device_name != "here":
        on_progress("counting what the run computes")
        return estimate_from_counts(settings, folder)
    device = prepared_device(settings)
    on_progress("building the model without weights, reading the texts")
    started = time.perf_counter()
    model = model_without_weights(settings.model, settings.offline)
    build = time.perf_counter() - started
    size, links = model_size(model), not saves_blocks_anew(model)
    streamed, notes = _is_streamed(settings, model, size, device)
    texts, place = read_texts(settings, model), existing(folder)
    free: dict[Place, int] = {"host": free_memory(), "disk": shutil.disk_usage(place).free}
    free |= {"device": torch.cuda.mem_get_info(device)[0]} if device.type == "cuda" else {}
    on_progress("writing a file and reading it again")
    disk = disk_speed(place)
    on_progress(f"pruning one block of random weights on {device}")
    found = measured(settings, model, size, texts, place, device)
    linked = links and (streamed or (size.total > ONE_FILE and settings.recovery is None))
    saved_anew = 0 if not settings.keeps_model else size.outside if linked else size.total
    parts = memory_parts(settings, size, texts, found, streamed, device.type == "cuda")
    parts += disk_parts(settings, size, found, saved_anew)
    seconds = _seconds(settings, size, texts, found, disk, build, streamed, saved_anew)
    kept = size.total * settings.keeps_model + size.masks * settings.save.masks * (not settings.is_dense)
    kept += sum(part.size or 0 for part in parts if part.name in LOGS)
    notes += [*texts.notes, *filter(None, [found.note]), *_not_estimated(settings)]
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
    parts = [Part("weights", "device", held), *pruning_parts(pruner, samples * length * size.state, states, "device")]
    parts += disk_parts(settings, size, states, written * settings.keeps_model)
    kept = size.total * settings.keeps_model + size.masks * settings.save.masks
    notes = [
        f"an estimate from counts for {settings.device_name}, on which nothing was measured: a sample passes a block "
        f"{passes.plain / samples:.2f} times without and {passes.differentiated / samples:.2f} times with a gradient",
        "fetching, calibration text and scoring are not counted; a disk of 2 GB/s and hashes of 1.3 GB/s are assumed",
    ]
    free: dict[Place, int] = {"device": int(chip.memory), "disk": shutil.disk_usage(existing(folder)).free}
    return Estimate(settings, folder, torch.device("cuda"), parts, kept, len(size.blocks), seconds, free, notes)


def _not_estimated(settings: RunSettings) -> list[str]:
    missing = {
        "the memory of a budget over depth is not estimated": isinstance(settings.budget, DepthSearch | Budget),
        "the structure is not estimated: time and memory are those of the dense model's blocks": settings.structure,
        "time and memory of the search over the whole model that follows the block loop are not estimated": (
            settings.pruner.traits.refinements
        ),
        "of the recovery's memory, the activations of a step are not estimated": settings.recovery,
    }
    return [note for note, holds in missing.items() if holds]


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


def _seconds(
    settings: RunSettings, size: ModelSize, texts: Texts, found: Measured, disk: DiskSpeed, build: float,
    streamed: bool, saved_anew: int,
) -> dict[str, float | None]:  # fmt: skip
    """Seconds by the parts of results.json's `seconds`, with one block's; None: not estimated."""
    load = build + (size.outside if streamed else size.total) * disk.read
    evaluated = _evaluation_seconds(size, texts, found, disk, streamed)
    models = 2 if settings.evaluator.dense and not settings.is_dense else 1
    seconds: dict[str, float | None] = {"load": load}
    if not settings.is_dense:
        a_block = pruning = None
        if found.block:
            # Pruning, and what makes it last: two hashes of the weights, three files; a streamed block is read first.
            weights, masks = sum(size.blocks) // len(size.blocks), size.masks // len(size.blocks)
            a_block = found.block.seconds + disk.keeping(3, weights + masks, 2 * weights + masks)
            a_block += weights * disk.read * streamed
            replayed = REPLAYED * (1 if streamed else len(size.blocks)) * found.block.forward_seconds
            pruning = (found.budget or 0.0) + replayed + a_block * len(size.blocks)
        seconds |= {"calibrate": texts.calibrate, "prune": pruning, "one block": a_block}
        if settings.recovery:  # its steps, and the files that are written each time held-out windows have judged
            cost = found.recovery
            kept = cost and disk.keeping(3, cost.kept_bytes, 2 * cost.kept_bytes)
            seconds["recover"] = cost.seconds + cost.checkpoints * kept if cost and kept else None
        seconds["save"] = _save_seconds(settings, size, disk, load, saved_anew, evaluated or 0.0)
    seconds["evaluate"] = None if evaluated is None else models * evaluated
    parts = [value for part, value in seconds.items() if part != "one block"]
    return {**seconds, "total": None if None in parts else sum(filter(None, parts))}


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


def _evaluation_seconds(
    size: ModelSize, texts: Texts, found: Measured, disk: DiskSpeed, streamed: bool
) -> float | None:
    """Of one model. A streamed one's blocks are read once a set, and once for the questions that HELD_BYTES hold."""
    if found.block is None or texts.read is None:
        return None
    passed = [*texts.windows, *texts.requests]
    reads = len(texts.windows) + sum(math.ceil(n * length * size.state / HELD_BYTES) for n, length in texts.requests)
    in_block, outside = found.token
    seconds = texts.read + sum(n * length for n, length in passed) * (in_block * len(size.blocks) + outside)
    return (seconds + sum(size.blocks) * disk.read * reads * streamed) * bool(passed)


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
