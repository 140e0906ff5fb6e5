"""The stage that tunes the whole pruned model under its zeros, and keeps the state that held-out text likes best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from math import isfinite

import torch
from torch import nn

from besa_exp.checkpoints.files import load_masks
from besa_exp.checkpoints.load import LoadedModel, load_model, vocabulary_size
from besa_exp.errors import ConfigurationError
from besa_exp.machine import distributed
from besa_exp.recovery.keep_bits import keep_of_masks, sparsity_of
from besa_exp.recovery.mezo import BlockFiles, Mezo
from besa_exp.recovery.objective import mean_loss
from besa_exp.recovery.parts import parts_of, report_of
from besa_exp.recovery.recipe import check_fit, check_recovery, follows_dense, method_of, objective_of, plan_of
from besa_exp.recovery.saved_states import SavedStates
from besa_exp.recovery.sharded import sharded, take_back
from besa_exp.recovery.tuner import Method
from besa_exp.recovery.tuning import Parts, Point, Recovery, tune
from besa_exp.run_folder.identity import as_plain
from besa_exp.runs.cpu_units import in_a_fast_dtype
from besa_exp.runs.rewrite import rewritten
from besa_exp.runs.run import Run, Work, num_blocks
from besa_exp.settings import ModelSettings, RecoverySettings, RunSettings
from besa_exp.tensors.keep_bits import KeepBits
from besa_exp.texts.calibration import Calibration
from besa_exp.texts.sources import SET_NAMES


def recover(run: Run, work: Work, dense: ModelSettings | None = None) -> Work:
    """The stage: kept weights are tuned, zeros stay. What an earlier attempt did is gone on with after its last
    checkpoint. `dense`: the model that is followed where one is; None: the one that was pruned."""
    if run.settings.recovery is None:
        return work
    asked = _with_length(run.settings.recovery, work.calibration)
    with run.spent.timed("recover"):
        keep = _keep(work)
        sparsity = sparsity_of(work.loaded.model, keep)
        run.console.stage(f"recovery: {asked.name}, {sparsity:.2%} of the weights stay zero")
        parts = _parts(run, work.loaded, work.calibration, asked)
        before = _accuracy(work.loaded, parts, asked)
        states = SavedStates(run.folder.recovery, as_plain(work.finished.identity) | {"text_sha256": parts.sha256})
        method = _method(run, work.loaded, asked)
        found, kept = _course(run, work.loaded, asked, keep, method, dense or run.settings.model, parts, states)
        if isinstance(method, Mezo) and method.files:
            work = _taken_again(work, method, keep, asked.seed, found.best_step, states)
            found = _rounded(work.loaded, found, parts, asked)
        else:
            found = _rounded(work.loaded, found, parts, asked)
            work = rewritten(work, lambda block: None, keep=kept if asked.exchange else None)
        report = report_of(asked, found, parts, before, _accuracy(work.loaded, parts, asked))
    run.console.stage(
        f"recovery: held-out loss {report.loss_before:.4f} before, {report.loss_after:.4f} after step "
        f"{report.best_step} of {report.steps}{report.task_said}"
        + (f"; stopped: {report.stopped}" if report.stopped else "")
    )
    run.tracker.log_summary({"recovery/loss_before": report.loss_before, "recovery/loss_after": report.loss_after})
    return replace(work, recovery=report)


def check_recoverable(run: Run, loaded: LoadedModel, calibration: Calibration) -> None:
    """ConfigurationError, before any weight is pruned: the model is streamed, does not fit the method, or the text does
    not suffice. The text's tokens are kept for the stage."""
    if run.settings.recovery is None:
        return
    asked = _with_length(run.settings.recovery, calibration)
    if loaded.weights is not None and (problem := _not_streamed(asked)):
        raise ConfigurationError(f"{problem}; {loaded.folder.name} is streamed: take a machine with more memory")
    if problems := check_fit(asked, loaded.model):
        raise ConfigurationError(*problems)
    with run.spent.timed("recover"):
        _parts(run, loaded, calibration, asked)


def _keep(work: Work) -> dict[str, KeepBits]:
    """The masks as they were made; a tensor of which all is kept is not named."""
    device = work.loaded.weights.device if work.loaded.weights else None
    keep: dict[str, KeepBits] = {}
    for file in work.finished.mask_files(len(work.reports)):
        keep |= keep_of_masks(work.loaded.model, load_masks(file), device)
    return {name: bits for name, bits in keep.items() if bits.count < bits.numel}


def _method(run: Run, loaded: LoadedModel, asked: RecoverySettings) -> Method:
    """MeZO of a streamed model has its blocks from files."""
    method = method_of(asked)
    if loaded.weights is None:
        return method
    assert isinstance(method, Mezo)
    folder = run.folder.recovery / f"blocks-{distributed.rank()}"
    return replace(method, files=BlockFiles(loaded.weights.load, loaded.weights.release, folder))


def _taken_again(
    work: Work, method: Mezo, keep: Mapping[str, KeepBits], seed: int, steps: int, states: SavedStates
) -> Work:
    """A streamed model's best weights are the pruned ones after so many `steps`, which are taken once more."""
    saved = states.read()
    assert saved is not None
    tuner = method.begin(work.loaded.model, keep, seed)
    tuner.projected, tuner.rates = (saved[1][name][:steps].tolist() for name in ("projected", "rates"))
    outside = {name: parameter.detach().clone() for name, parameter in tuner.parameters.items()}
    return rewritten(work, lambda block: tuner.catch_up(block.name, block.module, 0), outside)


def _course(
    run: Run,
    loaded: LoadedModel,
    asked: RecoverySettings,
    keep: Mapping[str, KeepBits],
    method: Method,
    dense: ModelSettings,
    parts: Parts,
    states: SavedStates,
) -> tuple[Recovery, dict[str, KeepBits]]:
    """All steps, shown and kept; a model in memory holds the best weights then."""
    teacher = _dense(run, loaded, dense) if follows_dense(asked) else None
    model = sharded(loaded.model) if asked.shard else loaded.model
    plan, objective = plan_of(asked), objective_of(asked, method, model, teacher)
    with run.console.tuning(plan.schedule.steps) as progress:

        def on_point(point: Point) -> None:
            # A number that is not finite is null: it ended the course, and results.json says so.
            values = asdict(point).items()
            step = {name: None if isinstance(one, float) and not isfinite(one) else one for name, one in values}
            run.folder.log_recovery_step(step)
            run.tracker.log_recovery_step(step)
            progress(point.step + 1, point.loss, point.held_out)
            if point.held_out is not None and distributed.is_first():
                run.spent.keep()

        found = tune(model, keep, method, objective, parts, plan, states, on_point)
    if asked.shard:
        take_back(loaded.model, model)
    return found


def _parts(run: Run, loaded: LoadedModel, calibration: Calibration, asked: RecoverySettings) -> Parts:
    """What is learned from, held out and scored."""
    settings, given = run.settings, run.settings.calibration
    drawn = given.path or (given.name if given.name in SET_NAMES else None)
    return parts_of(
        asked,
        calibration.input_ids if drawn is None else drawn,
        run.folder.recovery / "tokens.safetensors",
        loaded.tokenizer,
        vocabulary_size(loaded.model),
        settings.offline,
        given.column,
    )


def _accuracy(loaded: LoadedModel, parts: Parts, asked: RecoverySettings) -> float | None:
    with loaded.callable():
        return parts.accuracy(loaded.model, asked.windows_together)


def _rounded(loaded: LoadedModel, found: Recovery, parts: Parts, asked: RecoverySettings) -> Recovery:
    """Where weights are saved in another dtype they become what will be saved, and are judged so."""
    if loaded.stored is None:
        return found
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.copy_(parameter.to(loaded.stored))
    with loaded.callable():
        after = mean_loss(loaded.model, parts.held_out, asked.windows_together, parts.losses)
    return replace(found, after=after)


def _with_length(asked: RecoverySettings, calibration: Calibration) -> RecoverySettings:
    """Windows have as many tokens as the calibration's where nothing else is said."""
    return replace(asked, seq_len=asked.seq_len or calibration.input_ids.shape[1])


def check_recovery_of(
    settings: RunSettings, sparsity: float, context: int | None, blocks_removed: bool = False
) -> list[str]:
    """What speaks against the recovery of a run, in complete sentences. `blocks_removed`: by an earlier run."""
    asked = settings.recovery
    assert asked is not None
    removed = blocks_removed or (settings.structure is not None and not settings.structure.narrows)
    quantised = settings.pruner.traits.quantiser is not None
    if asked.seq_len is None:  # a calibration that is too long is reported as such
        asked = replace(asked, seq_len=min(settings.calibration.seq_len, context or settings.calibration.seq_len))
    problems = check_recovery(asked, sparsity, settings.pattern, context, quantised, removed)
    if settings.model.load == "streamed" and (problem := _not_streamed(asked)):
        problems.append(problem)
    return problems


def _not_streamed(asked: RecoverySettings) -> str | None:
    """Why a streamed model is not tuned so; None: it can be."""
    if asked.name == "mezo" and asked.distill == "none":
        return None
    return (
        "recovery with model.load=streamed: one block is in memory at a time, and gradients and the dense model need "
        "all of them; set model.load=whole, or use recovery=mezo with recovery.distill=none"
    )


def _dense(run: Run, pruned: LoadedModel, settings: ModelSettings) -> nn.Module:
    """The dense model, read again. ConfigurationError: states are compared block by block, and it has other blocks."""
    run.console.stage(f"recovery: loading the dense model {settings.path} to follow")
    dense = in_a_fast_dtype(load_model(settings, run.device, run.settings.offline), settings.dtype)
    asked, blocks = run.settings.recovery, [num_blocks(loaded) for loaded in (pruned, dense)]
    if asked and (asked.name == "blocks" or asked.distill == "squarehead") and blocks[0] != blocks[1]:
        raise ConfigurationError(
            f"recovery compares states block by block: {pruned.folder.name} has {blocks[0]} blocks, {settings.path} "
            f"{blocks[1]}; use recovery=full with recovery.distill=logits"
        )
    return dense.model
