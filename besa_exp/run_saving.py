"""What a run keeps of the pruned model: masks, the model folder and its card, and the check that others can read it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from besa_exp import distributed
from besa_exp.calibration import Calibration
from besa_exp.checkpoint import merge_masks
from besa_exp.cpu_units import in_a_fast_dtype
from besa_exp.evaluation.scores import callable_model
from besa_exp.finished_blocks import FinishedBlocks
from besa_exp.model_card import base_licence, model_card
from besa_exp.models import LoadedModel, load_model, model_path
from besa_exp.reloading import TOKENS, reloading, token_loss
from besa_exp.running import Run
from besa_exp.saving import check_saved, masks_origin, pruned_weights, save_pruned


def save(run: Run, loaded: LoadedModel, finished: FinishedBlocks, results: Mapping[str, Any]) -> LoadedModel:
    """Save what is to be kept; then the pruned model: the one that was saved, loaded anew, its zeros counted."""
    settings, folder = run.settings, run.folder
    with run.spent.timed("save"):
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
        return in_a_fast_dtype(reloaded, settings.model.dtype)


@contextmanager
def reread(
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
    with reloading(
        run.folder.model, tokens, expected, loaded.stored or loaded.model.dtype, model.trust_remote_code
    ) as answer:

        def reloaded() -> dict[str, Any]:
            run.console.stage("the saved model in a fresh process")
            with run.spent.timed("save"):
                return {"reloaded": answer()}

        yield reloaded


def _write_model(run: Run, loaded: LoadedModel, finished: FinishedBlocks, results: Mapping[str, Any]) -> None:
    settings, folder = run.settings, run.folder
    if settings.save.masks:
        merge_masks(finished.mask_files(len(results["blocks"])), folder.masks, masks_origin(settings, loaded))
    if settings.save.model:
        save_pruned(loaded, finished, folder.model, card(run, loaded, results))


def card(run: Run, loaded: LoadedModel, results: Mapping[str, Any]) -> str:
    """The model card; a model that is neither embedded nor a folder is named by its hub id."""
    model = run.settings.model
    local = Path(model_path(model)).exists()
    return model_card(results, sys.argv, None if local else model.path, model.revision, base_licence(loaded.folder))
