"""The stage that tunes the whole pruned model under its zeros, and keeps the state that held-out text likes best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from besa_exp.blocks.block import Block
from besa_exp.blocks.reports import RecoveryReport
from besa_exp.checkpoints.files import load_masks
from besa_exp.checkpoints.load import LoadedModel, load_model, vocabulary_size
from besa_exp.errors import ConfigurationError
from besa_exp.machine import distributed
from besa_exp.recovery.keep_bits import KeepBits, keep_of_masks, sparsity_of
from besa_exp.recovery.mezo import BlockFiles, Mezo, StreamedMezo
from besa_exp.recovery.objective import mean_loss
from besa_exp.recovery.recipe import (
    check_fit,
    check_recovery,
    follows_dense,
    method_of,
    objective_of,
    plan_of,
    steps_of,
)
from besa_exp.recovery.saved_states import SavedStates
from besa_exp.recovery.tuner import Method, Objective
from besa_exp.recovery.tuning import Point, Recovery, tune
from besa_exp.run_folder.identity import as_plain, request_identity
from besa_exp.runs.cpu_units import in_a_fast_dtype
from besa_exp.runs.rewrite import rewritten
from besa_exp.runs.run import Run, Work, num_blocks
from besa_exp.settings import CalibrationSettings, ModelSettings, RecoverySettings, RunSettings
from besa_exp.texts.calibration import Calibration
from besa_exp.texts.sources import SET_NAMES
from besa_exp.texts.token_stream import TokenStream, Windows
from besa_exp.texts.tuning_text import tuning_tokens


def recover(run: Run, work: Work, dense: ModelSettings | None = None) -> Work:
    """The stage: kept weights are tuned, zeros stay. What an earlier attempt did is gone on with after its last
    checkpoint. `dense`: the model that is followed where one is; None: the one that was pruned."""
    asked = run.settings.recovery
    if asked is None:
        return work
    with run.spent.timed("recover"):
        keep = _keep(work)
        sparsity = sparsity_of(work.loaded.model, keep)
        run.console.stage(f"recovery: {asked.name}, {sparsity:.2%} of the weights stay zero")
        if work.loaded.weights is None:
            found, seen = _tuned(run, work, asked, keep, dense or run.settings.model)
            work = rewritten(work, _unchanged, keep=found.keep if asked.exchange else None)
        else:
            found, seen, work = _tuned_streamed(run, work, asked, keep)
    report = RecoveryReport(
        method=asked.name,
        loss_before=found.before,
        loss_after=found.after,
        steps=len(found.points),
        best_step=found.best_step,
        tokens=seen,
        stopped=found.stopped,
    )
    run.console.stage(
        f"recovery: held-out loss {report.loss_before:.4f} before, {report.loss_after:.4f} after step "
        f"{report.best_step} of {report.steps}" + (f"; stopped: {report.stopped}" if report.stopped else "")
    )
    run.tracker.log_summary({"recovery/loss_before": report.loss_before, "recovery/loss_after": report.loss_after})
    return replace(work, recovery=report)


def check_recoverable(run: Run, loaded: LoadedModel, calibration: Calibration) -> None:
    """ConfigurationError, before any weight is pruned: the model is streamed, does not fit the method, or the text does
    not suffice. The text's tokens are kept for the stage."""
    asked = run.settings.recovery
    if asked is None:
        return
    if loaded.weights is not None and (problem := _not_streamed(asked)):
        raise ConfigurationError(f"{problem}; {loaded.folder.name} is streamed: take a machine with more memory")
    if problems := check_fit(asked, loaded.model):
        raise ConfigurationError(*problems)
    with run.spent.timed("recover"):
        _text(run, loaded, calibration, asked)


def _unchanged(block: Block) -> None:
    """The blocks hold the tuned weights already."""


def _keep(work: Work) -> dict[str, KeepBits]:
    """The masks as they were made; a tensor of which all is kept is not named."""
    device = work.loaded.weights.device if work.loaded.weights else None
    keep: dict[str, KeepBits] = {}
    for file in work.finished.mask_files(len(work.reports)):
        keep |= keep_of_masks(work.loaded.model, load_masks(file), device)
    return {name: bits for name, bits in keep.items() if bits.count < bits.numel}


def _tuned(
    run: Run, work: Work, asked: RecoverySettings, keep: Mapping[str, KeepBits], dense: ModelSettings
) -> tuple[Recovery, int]:
    """What became of it, and the number of tokens that were learned from; the model holds the best weights."""
    loaded, seq_len = work.loaded, length_of(asked, run.settings.calibration, work.calibration)
    method = method_of(asked, steps_of(asked, seq_len))
    teacher = _dense(run, loaded, dense) if follows_dense(asked) else None
    objective = objective_of(asked, method, loaded.model, teacher, seq_len)
    found, windows, _ = _course(run, work, asked, keep, method, objective)
    if loaded.stored is not None:
        _round(loaded.model, loaded.stored)
        found = replace(found, after=mean_loss(loaded.model, windows, asked.micro_batch))
    return found, sum(point.tokens for point in found.points)


def _tuned_streamed(
    run: Run, work: Work, asked: RecoverySettings, keep: Mapping[str, KeepBits]
) -> tuple[Recovery, int, Work]:
    """The same of a model whose blocks lie in files, by MeZO: the best weights are the pruned ones after as many of the
    steps, which are taken once more."""
    loaded, model = work.loaded, work.loaded.model
    assert loaded.weights is not None
    mezo = method_of(asked, steps_of(asked, length_of(asked, run.settings.calibration, work.calibration)))
    assert isinstance(mezo, Mezo)
    folder = run.folder.recovery / f"blocks-{distributed.rank()}"
    method = StreamedMezo(mezo, BlockFiles(loaded.weights.load, loaded.weights.release, folder))
    objective = objective_of(asked, mezo, model, None, 0)
    found, windows, states = _course(run, work, asked, keep, method, objective)
    saved = states.read()
    assert saved is not None
    tuner = method.begin(model, keep, asked.seed)
    tuner.projected, tuner.rates = (saved[1][name][: found.best_step].tolist() for name in ("projected", "rates"))
    outside = {name: parameter.detach().clone() for name, parameter in tuner.parameters.items()}
    work = rewritten(work, lambda block: tuner.catch_up(block.name, block.module, 0), outside)
    if work.loaded.stored is not None and work.loaded.weights is not None:
        _round(model, work.loaded.stored)
        with work.loaded.weights.on_demand(model):
            found = replace(found, after=mean_loss(model, windows, asked.micro_batch))
    return found, sum(point.tokens for point in found.points), work


def _course(
    run: Run, work: Work, asked: RecoverySettings, keep: Mapping[str, KeepBits], method: Method, objective: Objective
) -> tuple[Recovery, Tensor, SavedStates]:
    """All steps; the held-out windows, and where the states lie."""
    stream, (learned, held_out) = _text(run, work.loaded, work.calibration, asked)
    plan = plan_of(asked, steps_of(asked, length_of(asked, run.settings.calibration, work.calibration)))
    identity = as_plain(request_identity(run.config, work.calibration.tokens_sha256))
    states = SavedStates(run.folder.recovery, identity | {"text_sha256": stream.sha256})
    windows = held_out.all()
    with run.console.tuning(plan.schedule.steps) as progress:

        def on_point(point: Point) -> None:
            step = _finite(asdict(point))
            run.folder.log_recovery_step(step)
            run.tracker.log_recovery_step(step)
            progress(point.step + 1, point.loss, point.held_out)
            if point.held_out is not None and distributed.is_first():
                run.spent.keep()

        found = tune(work.loaded.model, keep, method, objective, learned, windows, plan, states, on_point)
    return found, windows, states


def _text(
    run: Run, loaded: LoadedModel, calibration: Calibration, asked: RecoverySettings
) -> tuple[TokenStream, tuple[Windows, Windows]]:
    """The tokens, and the windows that are learned from and held out."""
    settings = run.settings
    source, seq_len = asked.path or source_of(settings.calibration), length_of(asked, settings.calibration, calibration)
    read = partial(
        tuning_tokens,
        calibration.input_ids if source is None else source,
        run.folder.recovery / "tokens.safetensors",
        tokenizer=loaded.tokenizer,
        vocabulary=vocabulary_size(loaded.model),
        most=(steps_of(asked, seq_len) * asked.batch_size + asked.held_out) * seq_len,
        seed=asked.seed,
        offline=settings.offline,
        column=asked.column if asked.path else settings.calibration.column,
    )
    if distributed.is_first():
        read()
    distributed.barrier()
    stream = read()
    try:
        return stream, stream.windows(seq_len).split(asked.held_out)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def source_of(calibration: CalibrationSettings) -> str | None:
    """The set or file that the calibration is drawn from; None: it was given as values."""
    return calibration.path or (calibration.name if calibration.name in SET_NAMES else None)


def length_of(asked: RecoverySettings, settings: CalibrationSettings, calibration: Calibration | None = None) -> int:
    """The tokens of a window: what is said, else the calibration's."""
    return asked.seq_len or (settings.seq_len if calibration is None else calibration.input_ids.shape[1])


def check_recovery_of(
    settings: RunSettings, sparsity: float, context: int | None, blocks_removed: bool = False
) -> list[str]:
    """What speaks against the recovery of a run, in complete sentences. `blocks_removed`: by an earlier run."""
    assert settings.recovery is not None
    removed = blocks_removed or (settings.structure is not None and not settings.structure.narrows)
    quantised = settings.pruner.traits.quantiser is not None
    length = length_of(settings.recovery, settings.calibration)
    if settings.recovery.seq_len is None and context is not None:
        length = min(length, context)  # a calibration that is too long is reported as such
    problems = check_recovery(settings.recovery, sparsity, settings.pattern, length, context, quantised, removed)
    if settings.model.load == "streamed" and (problem := _not_streamed(settings.recovery)):
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
    run.console.stage(f"recovery: loading {settings.path}, to be followed")
    dense = in_a_fast_dtype(load_model(settings, run.device, run.settings.offline), settings.dtype)
    asked, blocks = run.settings.recovery, [num_blocks(loaded) for loaded in (pruned, dense)]
    if asked and (asked.name == "blocks" or asked.distill == "squarehead") and blocks[0] != blocks[1]:
        raise ConfigurationError(
            f"recovery compares states block by block: {pruned.folder.name} has {blocks[0]} blocks, {settings.path} "
            f"{blocks[1]}; use recovery=full with recovery.distill=logits"
        )
    return dense.model


def _finite(point: Mapping[str, Any]) -> dict[str, Any]:
    """A number that is not finite is null: it ended the course, and results.json says so."""
    return {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in point.items()}


@torch.no_grad()
def _round(model: nn.Module, stored: torch.dtype) -> None:
    """Weights become what will be saved."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(stored))
