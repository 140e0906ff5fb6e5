"""A run, from the request to the results. This file reads like the flow; every step lives in a module of its own.

Load -> score dense if asked -> calibration tokens -> block loop -> save, reload, recount -> score -> results.json.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from besa_exp.blocks.activations import activation_bytes, allocator
from besa_exp.blocks.pruner import Pruner
from besa_exp.blocks.reports import BlockReport, Step
from besa_exp.blocks.units import Refinement, blocks_together, refinements, unit_ends
from besa_exp.checkpoints.files import write_card
from besa_exp.checkpoints.finite_weights import check_finite_weights
from besa_exp.checkpoints.gguf_file import dequantised
from besa_exp.checkpoints.load import LoadedModel, load_model, model_context
from besa_exp.display.console import RunConsole
from besa_exp.display.missed_target import miss_of, out_of_reach
from besa_exp.display.tracker import Tracker
from besa_exp.errors import ConfigurationError
from besa_exp.machine import distributed
from besa_exp.machine.device import compute_dtype, peak_memory, prepared_device
from besa_exp.machine.environment import environment
from besa_exp.machine.process import imports_are_done
from besa_exp.methods.updates.updated import with_update
from besa_exp.run_folder.finished_blocks import FinishedBlocks
from besa_exp.run_folder.follower import opened
from besa_exp.run_folder.identity import IDENTITY, request_identity
from besa_exp.run_folder.inputs import fingerprint, write_inputs
from besa_exp.run_folder.spent import Spent
from besa_exp.runs.block_loop import BlockLoop, check_blocks
from besa_exp.runs.cpu_units import in_a_fast_dtype, rounding
from besa_exp.runs.dense import dense_results
from besa_exp.runs.expected_steps import steps_of_block
from besa_exp.runs.results import results_of, score_values
from besa_exp.runs.row_sparsities import keep_row_sparsities
from besa_exp.runs.run import Run, model_facts, tracking
from besa_exp.runs.save import block_names, card, reread, save
from besa_exp.runs.score import published, score, score_dense
from besa_exp.settings import RunSettings
from besa_exp.tensors.masks import Target
from besa_exp.texts.calibration import Calibration, load_calibration, save_tokens

logger = logging.getLogger(__name__)


def prune(settings: RunSettings, path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Run one prune in the folder `path`, `config` being what it was asked as, and return its results.json.

    An unfinished run of the same request goes on after its last whole block. ConfigurationError: the request cannot be
    carried out; RunError: it failed on the way. What was measured and pruned stays."""
    imports_are_done()
    config = {"method": settings.pruner_name, **config}  # as a report and an identity call it
    device = prepared_device(settings)
    resume = request_identity(config) if settings.resume else None
    with (
        distributed.joined(device),
        opened(path, settings.overwrite, resume) as folder,
        RunConsole(verbose=settings.verbose) as console,
    ):
        run = Run(settings, device, folder, console, Spent(folder.spent, partial(peak_memory, device)))
        folder.write_config(config)
        folder.write_environment(environment(device))
        if distributed.is_first():
            write_inputs(path, fingerprint(settings))
        if warning := out_of_reach(settings):
            logger.warning(warning)
        console.outline(settings)
        console.stage(f"loading {settings.model.path}")
        with run.spent.timed("load"):
            loaded = in_a_fast_dtype(load_model(settings.model, device, settings.offline), settings.model.dtype)
        results = dense_results(run, loaded, config) if settings.is_dense else _pruned(run, loaded, config)
        results |= dequantised(loaded.folder)
        results |= {"seconds": run.spent.seconds(), "peak_memory_bytes": run.spent.peak_memory()}
        _write(run, loaded, results)
    return results


def _pruned(run: Run, loaded: LoadedModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """results.json but for times and memory."""
    settings, folder, console, device = run.settings, run.folder, run.console, run.device
    check_finite_weights(loaded.model, settings.model.path)
    with run.spent.timed("calibrate"):
        calibration = _calibrate(run, loaded)
        check_blocks(loaded, distributed.own_samples(calibration.input_ids), settings.calibration.batch_size)
    finished = FinishedBlocks(folder.blocks, run.spent.keep)
    ends = unit_ends(len(block_names(loaded)), blocks_together(settings.pruner))
    identity = request_identity(config, calibration.tokens_sha256)
    reports = distributed.from_first(lambda: finished.begin(identity, ends))
    folder.rewind(reports)
    console.plan(settings, _facts(loaded, calibration, len(reports)))
    with tracking(run, config, reports) as tracker:
        dense = score_dense(run, loaded) if settings.evaluator.dense else None
        reports, finished = _prune_model(run, loaded, calibration, tracker, reports, finished)
        results = results_of(settings, calibration, reports, environment(device))
        results |= {"model_notes": [*loaded.notes]} if loaded.notes else {}
        if distributed.is_first():
            keep_row_sparsities(run, finished, results, tracker)
        saved = save(run, loaded, finished, results)
        with reread(run, loaded, finished, calibration) as reloaded:
            scores = score(run, "pruned", saved)
            results |= reloaded()
        tracker.log_scores(scores, dense)
        tracker.log_summary({"target_missed": miss_of(results)})
    results |= score_values(scores) | {"provenance": scores.provenance}
    results |= {"dense": score_values(dense)} if dense else {}
    return results | published(settings, dense or (scores if results["measured_sparsity"] == 0 else None))


def _calibrate(run: Run, loaded: LoadedModel) -> Calibration:
    settings = run.settings
    run.console.stage(f"calibration tokens from {settings.calibration.path or settings.calibration.name}")
    vocabulary = len(loaded.model.get_input_embeddings().weight)  # type: ignore[arg-type]
    context = model_context(loaded.model)
    calibration = distributed.from_first(
        lambda: load_calibration(
            settings.calibration, loaded.tokenizer, context, settings.offline, vocabulary=vocabulary
        )
    )
    if (samples := len(calibration.input_ids)) < distributed.num_ranks():
        raise ConfigurationError(
            f"calibration.num_samples={samples}: {distributed.num_ranks()} processes share the samples and each needs "
            "one at least; give more samples, or torchrun a smaller --nproc-per-node"
        )
    if settings.calibration.save_tokens and distributed.is_first():
        save_tokens(calibration, run.folder.tokens)
    return calibration


def _facts(loaded: LoadedModel, calibration: Calibration, done: int) -> dict[str, Any]:
    """What the plan shows besides the settings."""
    samples, length = calibration.input_ids.shape
    facts = {"calibration tokens": f"{samples} x {length}, sha256 {calibration.tokens_sha256[:12]}"}
    if done:
        logger.info("resuming: %d of %d blocks are already pruned", done, len(block_names(loaded)))
    return model_facts(loaded) | facts


def _prune_model(
    run: Run,
    loaded: LoadedModel,
    calibration: Calibration,
    tracker: Tracker,
    reports: list[BlockReport],
    finished: FinishedBlocks,
) -> tuple[list[BlockReport], FinishedBlocks]:
    """The block loop: each report goes to the run folder, the tracker and the console. Returns the reports of all
    blocks and where the blocks lie; after a search over the whole model, where that left them."""
    settings, input_ids = run.settings, distributed.own_samples(calibration.input_ids)
    later = refinements(settings.pruner, settings.pattern)
    pruner = settings.pruner if later else with_update(settings.pruner, settings.update)
    hidden = loaded.model.config.get_text_config().hidden_size
    samples, length = input_ids.shape
    needed = activation_bytes(samples, length, hidden, loaded.model.dtype.itemsize, pruner.dense_targets)
    _, allocate = allocator(settings.activations, run.device, run.folder.path, needed)
    batch_size, dtype = settings.calibration.batch_size, compute_dtype(settings)
    loop = BlockLoop(loaded, input_ids, batch_size, finished, len(reports), allocate, dtype, keeps_dense=bool(later))
    with run.spent.timed("prune"):
        _follow(run, loop, pruner, None if later else tracker, reports)
        if not later:
            return reports, finished
        return _refine(run, loop, later, tracker, reports), finished.refined


def _follow(
    run: Run, loop: BlockLoop, pruner: Pruner, tracker: Tracker | None, reports: list[BlockReport], budget: bool = True
) -> None:
    """One walk through the blocks after those of `reports`, which grows by the others."""
    settings = run.settings
    if tracker:
        for report in reports:
            tracker.log_block(report)
    steps = steps_of_block(pruner, len(loop.input_ids))
    seconds_before = [report.seconds for report in reports]
    with run.console.pruning(len(block_names(loop.loaded)), seconds_before, steps) as progress:

        def on_step(step: Step) -> None:
            run.folder.log_step(step)
            progress.step(step)

        def on_block(report: BlockReport) -> None:
            run.folder.log_block(report)
            if tracker:
                tracker.log_block(report)
            progress.block(report)
            reports.append(report)

        target = Target.parse(settings.sparsity, settings.pattern)
        pruner = rounding(pruner, loop.loaded.stored)
        loop.run(pruner, target, settings.budget if budget else None, on_step, on_block)


def _refine(
    run: Run, loop: BlockLoop, later: Sequence[Refinement], tracker: Tracker, before: Sequence[BlockReport]
) -> list[BlockReport]:
    """What follows the block loop over the whole model, and a second walk through the blocks that writes it."""
    refined = loop.finished.refined
    identity = json.loads((loop.finished.folder / IDENTITY).read_text(encoding="utf-8"))
    reports = distributed.from_first(lambda: refined.begin(identity))
    run.console.stage("the search over the whole model")
    decided = loop.refined(later, before, run.folder.log_model_step)
    run.folder.rewind(reports)
    pruner = with_update(decided, run.settings.update)
    second = replace(loop, finished=refined, done=len(reports), keeps_dense=False, dense_sha256={}, dense={})
    _follow(run, second, pruner, tracker, reports, budget=False)
    return reports


def _write(run: Run, loaded: LoadedModel, results: Mapping[str, Any]) -> None:
    """results.json, the model card with the scores, and the tables."""
    run.folder.write_results(results)
    if run.settings.keeps_model and distributed.is_first():
        write_card(run.folder.model, card(run, loaded, results))
    run.console.summary(results, run.folder.path)
