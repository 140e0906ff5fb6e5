"""A tuning of any checkpoint under its own zeros: what `runs.recover` does after pruning, entered later.

load -> its zeros are the masks -> scores -> recovery -> save -> scores -> results.json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from math import nan
from pathlib import Path
from typing import Any

from besa_exp.blocks.reports import BlockReport, LinearReport, Size, share_of_zeros
from besa_exp.checkpoints.files import check_savable, weights_sha256
from besa_exp.checkpoints.load import LoadedModel, check_finite_weights, model_context
from besa_exp.display.model_card import base_licence
from besa_exp.errors import ConfigurationError
from besa_exp.machine import distributed
from besa_exp.machine.environment import environment
from besa_exp.methods.pruners.dense import Dense
from besa_exp.presets import METHOD_GROUPS
from besa_exp.run_folder.finished_blocks import block_tensors
from besa_exp.run_folder.folder import read_results
from besa_exp.run_folder.identity import config_of
from besa_exp.run_folder.lookup import read_config, run_and_model
from besa_exp.runs.evaluate import DENSE
from besa_exp.runs.recover import check_recoverable, check_recovery_of, recover
from besa_exp.runs.results import results_of
from besa_exp.runs.run import (
    Run,
    Work,
    begin_blocks,
    calibration_of,
    load,
    model_facts,
    parameters,
    started,
    tracking,
)
from besa_exp.runs.save import save, written
from besa_exp.runs.score import score_pruned, score_untuned
from besa_exp.settings import ModelSettings, RunSettings, TuneSettings


def made_by(settings: TuneSettings) -> Mapping[str, Any]:
    """The results of the run that made the checkpoint; {} where none did."""
    run = run_and_model(settings.checkpoint)[0]
    return read_results(run) if run is not None and (run / "results.json").is_file() else {}


def made_with(settings: TuneSettings) -> dict[str, Any]:
    """How that run's methods were set, by group; reports tell two checkpoints of one method apart by it."""
    run = run_and_model(settings.checkpoint)[0]
    config = (read_config(run) if run else {}) | (made_by(settings).get("made_with") or {})
    return {group: config[group] for group in METHOD_GROUPS if config.get(group) and group != "recovery"}


def teacher_of(settings: TuneSettings) -> ModelSettings | None:
    """The dense model to follow: the one that is named, else what the checkpoint's run pruned; None: neither."""
    made = {"model": settings.teacher} if settings.teacher else made_by(settings)
    path, revision = made.get("model"), made.get("model_revision")
    same = replace(settings.model, name=Path(path or "").name, revision=revision, load="whole", context=None)
    return replace(same, path=path) if path else None


def has_lost_blocks(settings: TuneSettings) -> bool:
    """Whether the run that made the checkpoint removed whole blocks."""
    structure = made_by(settings).get("structure") or {"blocks": []}
    return any(block["kind"] == "removed" for block in structure["blocks"])


def as_run(settings: TuneSettings) -> RunSettings:
    """The same as a run's settings: method, pattern and target are those of the run that made the checkpoint, the
    recovery added; without one the target is what is there."""
    made = made_by(settings)
    both = {field.name for field in fields(RunSettings)} & {field.name for field in fields(settings)}
    return RunSettings(
        pruner=Dense(),
        pruner_name=f"{made.get('pruner', 'checkpoint')}+{settings.recovery.name}",
        sparsity=made.get("target_sparsity", 0.0),
        pattern=made.get("pattern", "unstructured"),
        **{name: getattr(settings, name) for name in both},
    )


def config_of_tuning(settings: TuneSettings) -> dict[str, Any]:
    own = {"checkpoint": settings.checkpoint, "dense": settings.dense, "teacher": settings.teacher}
    return config_of(as_run(settings)) | own


def tune_checkpoint(settings: TuneSettings, path: Path) -> dict[str, Any]:
    """Tune one checkpoint into the run folder `path` and return its results.json, `before` being the scores it had.

    An unfinished tuning of the same request goes on after its last checkpoint. ConfigurationError: the request cannot
    be carried out; RunError: it failed on the way."""
    asked = as_run(settings)
    with started(asked, path, config_of_tuning(settings)) as begun:
        loaded = load(begun, settings.checkpoint)
        run, work = _begun(begun, loaded, settings)
        with tracking(run) as tracker:
            run = replace(run, tracker=tracker)
            work = recover(run, score_untuned(run, work), teacher_of(settings))
            work = score_pruned(run, save(run, work))
        results, made = results_of(run.settings, work, environment(run.device)), made_by(settings)
        results |= {"calibration": made.get("calibration"), "checkpoint": settings.checkpoint}
        results["made_with"] = made_with(settings)
        results["model_name"] = made.get("model_name") or Path(made.get("model", settings.checkpoint)).name
        results |= {key: made[key] for key in ("model", "model_revision", "budget", "update", "ignore") if key in made}
        base = base_licence(loaded.folder, "base_model").get("base_model") if made else None  # as that run knew it
        return written(run, loaded.folder, results, base)


def _begun(run: Run, loaded: LoadedModel, asked: TuneSettings) -> tuple[Run, Work]:
    """The checkpoint, checked, and the run that aims at the zeros it has."""
    settings = run.settings
    check_finite_weights(loaded.model, settings.model.path)
    check_savable(loaded.model, settings.model.path)
    with run.spent.timed("calibrate"):
        calibration = distributed.from_first(lambda: calibration_of(settings.calibration, settings.offline, loaded))
    size = parameters(loaded)
    work = _adopted(run, Work(loaded, calibration, Size(size, size), begin_blocks(run, calibration)))
    sparsity = share_of_zeros(linear for report in work.reports for linear in report.linears)
    if sparsity < DENSE and not asked.dense:
        raise ConfigurationError(
            f"checkpoint={run.config['checkpoint']}: has no zeros ({sparsity:.2%}), so that nothing would be kept; "
            "name a pruned model, or tune it as it is with dense=true"
        )
    pruned = 0.0 if sparsity < DENSE else sparsity
    if problems := check_recovery_of(settings, pruned, model_context(loaded.model), has_lost_blocks(asked)):
        raise ConfigurationError(*problems)
    check_recoverable(run, loaded, calibration)
    run = replace(run, settings=replace(settings, sparsity=settings.sparsity or sparsity))
    run.console.plan(run.settings, model_facts(loaded))
    return run, work


def _adopted(run: Run, work: Work) -> Work:
    """What is zero counts as pruned: masks and reports of each block, as pruning would have left them."""
    distributed.from_first(work.finished.begin)
    reports = []
    for block in work.loaded.resident():
        masks = {name: linear.weight.detach() != 0 for name, linear in block.linears.items()}
        counted = [LinearReport.counted(name, mask, 0.0) for name, mask in masks.items()]
        linears = tuple(replace(linear, allocated=linear.sparsity) for linear in counted)
        report = BlockReport(block.index, linears, nan, nan, 0.0)
        if distributed.is_first():
            sha256 = weights_sha256(block_tensors(block.module, block.name))
            named = {f"{block.name}.{name}.weight": mask for name, mask in masks.items()}
            work.finished.write(report, {}, named, sha256, weights_updated=True)
        reports.append(report)
    run.folder.rewind(reports)
    distributed.barrier()  # the first rank has written the masks
    return replace(work, reports=tuple(reports))
