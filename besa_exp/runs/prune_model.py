"""The stage that prunes: the block loop, and where the pruner asks for it a search over the whole model after it."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor

from besa_exp.blocks.activations import OF_ALL_BLOCKS, allocator
from besa_exp.blocks.probe import num_learned
from besa_exp.blocks.pruner import Pruner, Refinement
from besa_exp.blocks.reports import BlockReport, Step
from besa_exp.blocks.units import unit_ends
from besa_exp.checkpoints.files import load_masks
from besa_exp.checkpoints.load import LoadedModel
from besa_exp.errors import ConfigurationError
from besa_exp.machine import atomic, distributed
from besa_exp.machine.disk import existing, size_in_words
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.besa_paper import BesaPaper
from besa_exp.methods.updates.updated import with_update
from besa_exp.run_folder.finished_blocks import FinishedBlocks
from besa_exp.runs.block_loop import BlockLoop, Decided
from besa_exp.runs.cpu_units import Rounding
from besa_exp.runs.run import Run, Work, num_blocks, weights_in_linears
from besa_exp.runs.save import pruned_weights
from besa_exp.settings import RunSettings
from besa_exp.tensors.masks import Goal

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # of the rows' sparsities
logger = logging.getLogger(__name__)


def check_refinements(settings: RunSettings, loaded: LoadedModel, folder: Path) -> None:
    """ConfigurationError, before any long work: what a search over the whole model holds of all blocks fits nowhere.
    `folder`: where its files would lie, which are a warning."""
    goal, weights = Goal.parse(settings.sparsity, settings.pattern), weights_in_linears(loaded)
    for refinement in settings.pruner.traits.refinements:
        fixed, movable = refinement.bytes_held(weights, goal.sparsity)
        device, free = loaded.model.device, shutil.disk_usage(existing(folder)).free
        place, _ = allocator("auto", device, folder, fixed, OF_ALL_BLOCKS)
        where, _ = allocator("auto", device, folder, movable, OF_ALL_BLOCKS)
        said = f"the {refinement.steps} steps under the whole model's loss hold {size_in_words(fixed + movable)} of all"
        said += f" {weights:,} weights at once"
        if place != "device" or (where == "disk" and movable > free):
            raise ConfigurationError(
                f"{said}, for which there is no room in memory, nor in {folder} ({size_in_words(free)} free); leave "
                "them out (pruner=besa_reconstruct for best, pruner.scope=block for besa), or give them more"
            )
        if where == "disk":
            logger.warning("%s, which memory has no room for: they will work in files in %s, slowly", said, folder)


def prune_model(run: Run, work: Work) -> Work:
    """The stage: the model with zeros in its linears. Blocks that an earlier attempt finished are taken from there."""
    settings, loaded = run.settings, work.loaded
    later = settings.pruner.traits.refinements
    pruner = settings.pruner if later else with_update(settings.pruner, settings.update)
    reports = _begin(run, work)
    input_ids = distributed.own_samples(work.calibration.input_ids)
    kept, finished = work.structure.kept if work.structure else (), work.finished
    loop = BlockLoop.of(settings, loaded, input_ids, finished, len(reports), kept)
    with run.spent.timed("prune"):
        if later and (refined := _refined_before(run, work)):
            reports = _follow(run, work, loop.again(len(refined)), Decided([], refined), refined, budget=False)
        else:
            reports = _follow(run, work, loop, pruner, reports, tracks=not later)
            reports = _refine(run, work, loop, later, reports) if later else reports
    finished = finished.refined if later else finished
    if distributed.is_first():
        _keep_row_sparsities(run, finished, work.numbered(reports))
    distributed.barrier()  # the first rank has written the blocks
    loaded = pruned_weights(loaded, finished) if loaded.weights else loaded
    return replace(work, loaded=loaded, finished=finished, reports=tuple(reports))


def _begin(run: Run, work: Work) -> list[BlockReport]:
    """The reports of the blocks that are finished; the run's records hold those alone from here on."""
    ends = unit_ends(num_blocks(work.loaded), run.settings.pruner.traits.blocks_together)
    reports = distributed.from_first(lambda: work.finished.begin(ends))
    run.folder.rewind(work.numbered(reports))
    if reports:
        logger.info("resuming: %d of %d blocks are already pruned", len(reports), num_blocks(work.loaded))
    return reports


def _follow(
    run: Run,
    work: Work,
    loop: BlockLoop,
    pruner: Pruner,
    before: Sequence[BlockReport],
    tracks: bool = True,
    budget: bool = True,
) -> list[BlockReport]:
    """One walk through the blocks after those of `before`: the reports of all blocks. Each goes to the run folder, the
    console and, where `tracks`, the tracker."""
    settings, reports = run.settings, list(before)
    if tracks:
        for report in work.numbered(reports):
            run.tracker.log_block(report)
    steps, seconds_before = steps_of_block(pruner, len(loop.input_ids)), [report.seconds for report in reports]
    with run.console.pruning(num_blocks(loop.loaded), seconds_before, steps) as progress:

        def on_step(step: Step) -> None:
            step = replace(step, block=work.number(step.block))
            run.folder.log_step(step)
            progress.step(step)

        def on_block(report: BlockReport) -> None:
            (numbered,) = work.numbered([report])
            run.folder.log_block(numbered)
            if tracks:
                run.tracker.log_block(numbered)
            progress.block(numbered)
            reports.append(report)

        goal = Goal.parse(settings.sparsity, settings.pattern)
        pruner = Rounding(pruner, loop.loaded.stored) if loop.loaded.stored else pruner
        loop.run(pruner, goal, settings.budget if budget else None, on_step, on_block)
    return reports


def _refined_before(run: Run, work: Work) -> list[BlockReport]:
    """The reports of all blocks as the search over the whole model left them, where an earlier attempt has written them
    all; else none."""
    reports = distributed.from_first(work.finished.refined.begin)
    if len(reports) < num_blocks(work.loaded):
        return []
    run.folder.rewind(work.numbered(reports))
    return reports


def _refine(
    run: Run, work: Work, loop: BlockLoop, later: Sequence[Refinement], before: Sequence[BlockReport]
) -> list[BlockReport]:
    """What follows the block loop over the whole model, and a second walk through the blocks that writes it."""
    reports = distributed.from_first(loop.finished.refined.begin)
    run.console.stage("the search over the whole model")
    dense_targets = run.settings.pruner.traits.dense_targets
    decided = replace(loop.refined(later, before, run.folder.log_model_step), dense_targets=dense_targets)
    run.folder.rewind(work.numbered(reports))
    pruner = with_update(decided, run.settings.update)
    return _follow(run, work, loop.again(len(reports)), pruner, reports, budget=False)


def steps_of_block(pruner: Any, num_samples: int) -> int | None:
    """How many optimisation steps a block will take, which a progress line needs before the first is done. None: not
    known before a block has shown it, or none at all."""
    learn = num_learned(num_samples)
    if isinstance(pruner, Besa):
        parts = 2 if pruner.scope == "sub_block" else 1
        return parts * pruner.epochs * math.ceil(learn / pruner.batch_size)
    if isinstance(pruner, BesaPaper):
        return pruner.epochs * math.ceil(num_samples / pruner.batch_size)
    tuning = getattr(pruner, "tuning", None)
    return tuning.num_steps(learn) if tuning is not None else None


def row_sparsities(keep_mask: Bool[Tensor, "out in"]) -> Float[Tensor, " out"]:
    """How sparse each row of a linear is: its pruned weights / its weights."""
    return 1 - keep_mask.sum(dim=1, dtype=torch.int32).float() / keep_mask.shape[1]


def _keep_row_sparsities(run: Run, finished: FinishedBlocks, reports: Sequence[BlockReport]) -> None:
    """BESA's own output, as the masks of the finished blocks say: all rows in one file, float32 by the linear's name in
    the model, and quantiles of each block in metrics.jsonl and the tracker. For the first of several ranks."""
    found: dict[str, Tensor] = {}
    for report, file in zip(reports, finished.mask_files(len(reports)), strict=True):
        rows = {name.removesuffix(".weight"): row_sparsities(mask) for name, mask in load_masks(file).items()}
        found |= rows
        paths = [linear.name for linear in report.linears]
        by_path = {path: own for path in paths for name, own in rows.items() if name.endswith(f".{path}")}
        at = torch.tensor(QUANTILES)  # linear between two rows
        run.folder.log_rows(report.index, {path: torch.quantile(own, at).tolist() for path, own in by_path.items()})
        run.tracker.log_rows(report.index, {path: own.tolist() for path, own in by_path.items()})
    with atomic.replaced_file(run.folder.rows) as partial:
        save_file(found, partial)
