"""A run, from the request to the results. This file reads like the flow; every step lives in a module of its own.

Load -> score dense if asked -> calibration tokens -> block loop -> save, reload, recount -> score -> results.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from besa_exp import distributed
from besa_exp.activations import activation_bytes, allocator
from besa_exp.block_loop import BlockLoop
from besa_exp.calibration import Calibration, load_calibration, save_tokens
from besa_exp.checkpoint import merge_masks, write_card
from besa_exp.console import RunConsole
from besa_exp.dense_scores import FOLDER as DENSE_SCORES
from besa_exp.dense_scores import dense_key, shared_dense_scores
from besa_exp.device import peak_memory, prepared_device
from besa_exp.environment import environment
from besa_exp.errors import ConfigurationError
from besa_exp.evaluation.finished_scores import FinishedScores
from besa_exp.evaluation.scores import Scores, callable_model, evaluate
from besa_exp.finished_blocks import FinishedBlocks
from besa_exp.followed_folder import FollowedFolder, opened
from besa_exp.identity import request_identity
from besa_exp.masks import Target
from besa_exp.model_card import base_licence, model_card
from besa_exp.models import LoadedModel, load_model, model_context, model_path
from besa_exp.published import compared_with_published
from besa_exp.reloading import TOKENS, reloading, token_loss
from besa_exp.reports import BlockReport, Step
from besa_exp.results import results_of, score_values
from besa_exp.run_folder import RunFolder
from besa_exp.saving import block_names, check_saved, masks_origin, pruned_weights, save_pruned
from besa_exp.scope import blocks_together, unit_ends
from besa_exp.settings import RunSettings, TrackerSettings
from besa_exp.tracking import Tracker, start_tracker
from besa_exp.updates.updated import with_update


@dataclass(frozen=True)
class Run:
    """One run under way: what is asked, where it is written and shown, and the seconds spent on each part."""

    settings: RunSettings
    device: torch.device
    folder: RunFolder | FollowedFolder
    console: RunConsole
    seconds: dict[str, float]

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time of the block to `part`."""
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


def prune(settings: RunSettings, path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Run one prune in the folder `path`, `config` being what it was asked as, and return its results.json.

    An unfinished run of the same request goes on after its last whole block. ConfigurationError: the request cannot be
    carried out; RunError: it failed on the way. What was measured and pruned stays."""
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
            dense = _score_dense(run, loaded) if settings.evaluator.dense else None
            _prune_model(run, loaded, calibration, tracker, reports, finished)
            results = results_of(settings, calibration, reports, environment(device))
            saved = _save(run, loaded, finished, results)
            with _reloading(run, loaded, finished, calibration) as reloaded:
                scores = _score(run, "pruned", saved)
                results |= reloaded()
            tracker.log_scores(scores, dense)
        results |= score_values(scores) | {"provenance": scores.provenance}
        results |= {"dense": score_values(dense)} if dense else {}
        results |= _published(settings, dense or (scores if results["measured_sparsity"] == 0 else None))
        run.seconds["total"] = time.perf_counter() - started
        results |= {"seconds": run.seconds, "peak_memory_bytes": peak_memory(device)}
        _write(run, loaded, results)
    return results


def _published(settings: RunSettings, dense: Scores | None) -> dict[str, Any]:
    """The part of results.json that compares the dense model's perplexities with the published ones."""
    compared = compared_with_published(settings.model.published_perplexity, dense) if dense else {}
    return {"published": compared} if compared else {}


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


def _score_dense(run: Run, loaded: LoadedModel) -> Scores:
    """The dense model's scores, measured once for all runs beside this one."""
    if distributed.num_ranks() > 1:  # one process locks the shared scores, and all ranks are needed to measure them
        return _score(run, "dense", loaded)
    settings, console = run.settings, run.console
    key = dense_key(loaded, settings.evaluator, settings.seed, settings.deterministic, run.device)
    scores, known = shared_dense_scores(
        run.folder.path.parent / DENSE_SCORES,
        key,
        lambda: _score(run, "dense", loaded),
        lambda: console.stage("dense model: waiting for another run that scores it"),
    )
    if known:
        console.stage("dense model: scored before by another run")
        run.folder.log_scores("dense", scores)
    return scores


def _score(run: Run, which: str, loaded: LoadedModel) -> Scores:
    """Scores of the dense or the pruned model, recorded in metrics.jsonl as soon as they are known."""
    settings, console = run.settings, run.console
    earlier = FinishedScores(run.folder.scores, which)

    def on_progress(text: str) -> None:
        console.stage(f"{which} model: {text}")

    with run.timed("evaluate"):
        scores = evaluate(loaded, settings.evaluator, settings.offline, settings.seed, on_progress, earlier)
    run.folder.log_scores(which, scores)
    return scores


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
    loop = BlockLoop(loaded, input_ids, settings.calibration.batch_size, finished, len(reports), allocate)
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


def _save(run: Run, loaded: LoadedModel, finished: FinishedBlocks, results: Mapping[str, Any]) -> LoadedModel:
    """Save what is to be kept; then the pruned model: the one that was saved, loaded anew, its zeros counted."""
    settings, folder = run.settings, run.folder
    with run.timed("save"):
        if settings.save.model:
            run.console.stage("saving the pruned model and loading it anew")
        if distributed.is_first():
            _write_model(run, loaded, finished, results)
        distributed.barrier()
        if not settings.save.model:
            return pruned_weights(loaded, finished) if loaded.weights else loaded
        load = "streamed" if loaded.weights else "whole"
        saved = replace(settings.model, path=str(folder.model), revision=None, dtype="auto", load=load)
        reloaded = replace(load_model(saved, run.device, offline=True), tokenizer=loaded.tokenizer)
        check_saved(reloaded, results)
        return reloaded


@contextmanager
def _reloading(
    run: Run, loaded: LoadedModel, finished: FinishedBlocks, calibration: Calibration
) -> Iterator[Callable[[], dict[str, Any]]]:
    """The saved model in a fresh process meanwhile; what is yielded gives that part of results.json when it is done."""
    save = run.settings.save
    if not save.model or not distributed.is_first():
        yield dict
        return
    if not save.verify:
        yield lambda: {"reloaded": {"skipped": "save.verify=false"}}
        return
    pruned, tokens = pruned_weights(loaded, finished) if loaded.weights else loaded, calibration.input_ids[:1, :TOKENS]
    with callable_model(pruned):
        expected = token_loss(pruned.model, tokens)
    model = run.settings.model
    with reloading(run.folder.model, tokens, expected, loaded.model.dtype, model.trust_remote_code) as answer:

        def reloaded() -> dict[str, Any]:
            run.console.stage("the saved model in a fresh process")
            with run.timed("save"):
                return {"reloaded": answer()}

        yield reloaded


def _write_model(run: Run, loaded: LoadedModel, finished: FinishedBlocks, results: Mapping[str, Any]) -> None:
    settings, folder = run.settings, run.folder
    if settings.save.masks:
        merge_masks(finished.mask_files(len(results["blocks"])), folder.masks, masks_origin(settings, loaded))
    if settings.save.model:
        save_pruned(loaded, finished, folder.model, _card(run, loaded, results))


def _card(run: Run, loaded: LoadedModel, results: Mapping[str, Any]) -> str:
    """The model card; a model that is neither embedded nor a folder is named by its hub id."""
    model = run.settings.model
    local = Path(model_path(model)).is_dir()
    return model_card(results, sys.argv, None if local else model.path, model.revision, base_licence(loaded.folder))


def _write(run: Run, loaded: LoadedModel, results: Mapping[str, Any]) -> None:
    """results.json, the model card with the scores, and the tables."""
    run.folder.write_results(results)
    if run.settings.save.model and distributed.is_first():
        write_card(run.folder.model, _card(run, loaded, results))
    run.console.summary(results, run.folder.path)
