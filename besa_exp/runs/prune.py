"""A run, from the request to the results. This file reads like the flow; every stage lives in a module of its own.

    load -> calibration tokens -> STAGES -> results.json

The structure (whole blocks, heads or channels taken out) comes first: it returns the work with the narrower model as
`loaded` and with its report. A recovery belongs between the pruning and the saving: it moves the kept weights of
`loaded` and returns what `rewrite.rewritten` gives, with its report.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from besa_exp.blocks.ignored import Ignored
from besa_exp.blocks.reports import Size
from besa_exp.checkpoints.files import check_savable
from besa_exp.checkpoints.gguf_file import dequantised
from besa_exp.checkpoints.load import LoadedModel, check_finite_weights
from besa_exp.display.missed_target import miss_of, out_of_reach
from besa_exp.errors import ConfigurationError
from besa_exp.evaluation.policies import check_skips
from besa_exp.machine import distributed
from besa_exp.machine.environment import environment
from besa_exp.run_folder.identity import config_of
from besa_exp.runs.block_loop import check_blocks
from besa_exp.runs.dense import dense_results
from besa_exp.runs.narrow import narrow
from besa_exp.runs.prune_model import check_refinements, prune_model
from besa_exp.runs.recover import check_recoverable, recover
from besa_exp.runs.results import results_of
from besa_exp.runs.run import (
    Run,
    Work,
    begin_blocks,
    calibration_of,
    load,
    model_facts,
    parameters,
    slow_work,
    started,
    tracking,
)
from besa_exp.runs.save import save, written
from besa_exp.runs.score import score_dense, score_pruned, score_untuned
from besa_exp.settings import RunSettings
from besa_exp.texts.calibration import Calibration
from besa_exp.texts.tokens import write_token_file

STAGES: tuple[Callable[[Run, Work], Work], ...] = (
    score_dense,
    narrow,
    prune_model,
    score_untuned,
    recover,
    save,
    score_pruned,
)
logger = logging.getLogger(__name__)


def prune(
    settings: RunSettings,
    path: Path,
    config: Mapping[str, Any] | None = None,
    calibrate: Callable[[LoadedModel], Calibration] | None = None,
) -> dict[str, Any]:
    """Run one prune in the folder `path` and return its results.json.

    `config` is the request as it is written to config.yaml and compared before a run is resumed; what it does not say
    is taken from `settings`. `calibrate` gives the calibration tokens, by default those that `settings` name.

    An unfinished run of the same request goes on after its last whole block. ConfigurationError: the request cannot be
    carried out; RunError: it failed on the way. What was measured and pruned stays."""
    config = {**config_of(settings), **(config or {}), "method": settings.pruner_name}
    with started(settings, path, config) as run:
        if warning := out_of_reach(settings):
            logger.warning(warning)
        run.console.outline(settings)
        results, source = dense_results(run) if settings.is_dense else _pruned(run, calibrate)
        return written(run, source, results | dequantised(source))


def _pruned(run: Run, calibrate: Callable[[LoadedModel], Calibration] | None) -> tuple[dict[str, Any], Path]:
    """results.json but for times and memory, and the dense model's folder. The work alone holds the model: what a stage
    puts in its place takes its memory."""
    work = _begun(run, load(run, run.settings.model.path), calibrate)
    source = work.loaded.folder
    with tracking(run) as tracker:
        run = replace(run, tracker=tracker)
        for stage in STAGES:
            work = stage(run, work)
        results = results_of(run.settings, work, environment(run.device))
        tracker.log_summary({"target_missed": miss_of(results), "parameters_left": work.parameters.left})
    return results, source


def _begun(run: Run, loaded: LoadedModel, calibrate: Callable[[LoadedModel], Calibration] | None) -> Work:
    """The dense model and its calibration tokens, checked."""
    settings = run.settings
    check_finite_weights(loaded.model, settings.model.path)
    check_skips(loaded, settings.skipping)
    check_savable(loaded.model, settings.model.path)
    with run.spent.timed("calibrate"):
        calibration = _calibrate(
            run, loaded, calibrate or partial(calibration_of, settings.calibration, settings.offline)
        )
        own_ids, batch_size = distributed.own_samples(calibration.input_ids), settings.calibration.batch_size
        check_blocks(loaded, own_ids, batch_size, Ignored(settings.ignore), settings.pattern)
    check_refinements(settings, loaded, run.folder.path)
    check_recoverable(run, loaded, calibration)
    finished = begin_blocks(run, calibration)
    samples, length = calibration.input_ids.shape
    tokens = f"{samples} x {length}, sha256 {calibration.tokens_sha256[:12]}"
    kind, batch_size = run.device.type, getattr(settings.pruner, "batch_size", None)
    slow = slow_work(kind, loaded.model.dtype, settings.compute_dtype, distributed.num_ranks(), batch_size)
    run.console.plan(settings, model_facts(loaded) | slow | {"calibration tokens": tokens})
    size = parameters(loaded)
    return Work(loaded, calibration, Size(size, size), finished)


def _calibrate(run: Run, loaded: LoadedModel, calibrate: Callable[[LoadedModel], Calibration]) -> Calibration:
    settings = run.settings
    run.console.stage(f"calibration tokens from {settings.calibration.path or settings.calibration.name}")
    calibration = distributed.from_first(lambda: calibrate(loaded))
    if (samples := len(calibration.input_ids)) < distributed.num_ranks():
        raise ConfigurationError(
            f"calibration.num_samples={samples}: {distributed.num_ranks()} processes share the samples and each needs "
            "one at least; give more samples, or torchrun a smaller --nproc-per-node"
        )
    if settings.calibration.save_tokens and distributed.is_first():
        write_token_file(calibration.input_ids, run.folder.tokens)
    return calibration
