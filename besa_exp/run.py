"""A run, from the request to the results. This file reads like the flow; every step lives in a module of its own.

Load -> score dense if asked -> calibration tokens -> block loop -> save, reload, recount -> score -> results.json.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from besa_exp import distributed
from besa_exp.activations import activation_bytes, allocator
from besa_exp.block_loop import BlockLoop
from besa_exp.calibration import Calibration, load_calibration, save_tokens
from besa_exp.checkpoint import write_card
from besa_exp.console import RunConsole
from besa_exp.device import compute_dtype, peak_memory, prepared_device
from besa_exp.environment import environment
from besa_exp.errors import ConfigurationError
from besa_exp.finished_blocks import FinishedBlocks
from besa_exp.followed_folder import opened
from besa_exp.gguf_file import dequantised
from besa_exp.identity import request_identity
from besa_exp.masks import Target
from besa_exp.models import LoadedModel, load_model, model_context
from besa_exp.process import imports_are_done
from besa_exp.reports import BlockReport, Step
from besa_exp.results import results_of, score_values
from besa_exp.run_saving import card, reread, save
from besa_exp.run_scoring import published, score, score_dense
from besa_exp.running import Run
from besa_exp.saving import block_names
from besa_exp.scope import blocks_together, unit_ends
from besa_exp.settings import RunSettings, TrackerSettings
from besa_exp.tracking import Tracker, start_tracker
from besa_exp.updates.updated import with_update


def prune(settings: RunSettings, path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Run one prune in the folder `path`, `config` being what it was asked as, and return its results.json.

    An unfinished run of the same request goes on after its last whole block. ConfigurationError: the request cannot be
    carried out; RunError: it failed on the way. What was measured and pruned stays."""
    imports_are_done()
    started = time.perf_counter()
    device = prepared_device(settings)
    resume = request_identity(config) if settings.resume else None
    with distributed.joined(device), opened(path, settings.overwrite, resume) as folder, RunConsole() as console:
        run = Run(settings, device, folder, console, {})
        folder.write_config(config)
        folder.write_environment(environment(device))
        console.stage(f"loading {settings.model.path}")
        with run.timed("load"):
            loaded = load_model(settings.model, device, settings.offline)
        with run.timed("calibrate"):
            calibration = _calibrate(run, loaded)
        finished = FinishedBlocks(folder.blocks)
        ends = unit_ends(len(block_names(loaded)), blocks_together(settings.pruner))
        identity = request_identity(config, calibration.tokens_sha256)
        reports = distributed.from_first(lambda: finished.begin(identity, ends))
        folder.rewind(reports)
        console.plan(settings, _facts(loaded, calibration, len(reports)))
        with _tracking(run, config, reports) as tracker:
            dense = score_dense(run, loaded) if settings.evaluator.dense else None
            _prune_model(run, loaded, calibration, tracker, reports, finished)
            results = results_of(settings, calibration, reports, environment(device)) | dequantised(loaded.folder)
            saved = save(run, loaded, finished, results)
            with reread(run, loaded, finished, calibration) as reloaded:
                scores = score(run, "pruned", saved)
                results |= reloaded()
            tracker.log_scores(scores, dense)
        results |= score_values(scores) | {"provenance": scores.provenance}
        results |= {"dense": score_values(dense)} if dense else {}
        results |= published(settings, dense or (scores if results["measured_sparsity"] == 0 else None))
        run.seconds["total"] = time.perf_counter() - started
        results |= {"seconds": run.seconds, "peak_memory_bytes": peak_memory(device)}
        _write(run, loaded, results)
    return results


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
    facts = {
        "weights": f"{sum(parameter.numel() for parameter in loaded.model.parameters()):,}",
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(next(loaded.model.parameters()).device),
        "calibration tokens": f"{samples} x {length}, sha256 {calibration.tokens_sha256[:12]}",
    }
    facts |= {"in memory": "one block at a time"} if loaded.weights else {}
    return facts | ({"going on after": f"{done} finished blocks"} if done else {})


@contextmanager
def _tracking(run: Run, config: Mapping[str, Any], reports: Sequence[BlockReport]) -> Iterator[Tracker]:
    """The tracker, finished with what was reported however the run ends."""
    path = run.folder.path
    tracked = run.settings.tracker if distributed.is_first() else TrackerSettings("none")
    tracker = start_tracker(tracked, path, config, path.name, run.settings.pruner_name)
    failed = True
    try:
        yield tracker
        failed = False
    finally:
        tracker.finish(reports, failed)


def _prune_model(
    run: Run,
    loaded: LoadedModel,
    calibration: Calibration,
    tracker: Tracker,
    reports: list[BlockReport],
    finished: FinishedBlocks,
) -> None:
    """The block loop: each report goes to the run folder, the tracker and the console."""
    settings, input_ids = run.settings, distributed.own_samples(calibration.input_ids)
    pruner = with_update(settings.pruner, settings.update)
    for report in reports:
        tracker.log_block(report)
    hidden = loaded.model.config.get_text_config().hidden_size
    samples, length = input_ids.shape
    needed = activation_bytes(samples, length, hidden, loaded.model.dtype.itemsize, pruner.dense_targets)
    _, allocate = allocator(settings.activations, run.device, run.folder.path, needed)
    batch_size, dtype = settings.calibration.batch_size, compute_dtype(settings)
    loop = BlockLoop(loaded, input_ids, batch_size, finished, len(reports), allocate, dtype)
    with run.timed("prune"), run.console.pruning(len(block_names(loaded)) - len(reports)) as progress:

        def on_step(step: Step) -> None:
            run.folder.log_step(step)
            progress.step(step)

        def on_block(report: BlockReport) -> None:
            run.folder.log_block(report)
            tracker.log_block(report)
            progress.block(report)
            reports.append(report)

        loop.run(pruner, Target.parse(settings.sparsity, settings.pattern), settings.budget, on_step, on_block)


def _write(run: Run, loaded: LoadedModel, results: Mapping[str, Any]) -> None:
    """results.json, the model card with the scores, and the tables."""
    run.folder.write_results(results)
    if run.settings.save.model and distributed.is_first():
        write_card(run.folder.model, card(run, loaded, results))
    run.console.summary(results, run.folder.path)
