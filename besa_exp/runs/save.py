"""What a run leaves of the model: the masks, and a plain Hugging Face folder that is then read again and counted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from besa_exp.blocks.block import discover_blocks
from besa_exp.blocks.linears import discover_linears
from besa_exp.blocks.reports import BlockReport
from besa_exp.checkpoints.files import merge_masks, save_beside_weights, save_model, weights_sha256, write_card
from besa_exp.checkpoints.fresh_process import TOKENS, reloading, token_loss
from besa_exp.checkpoints.inspect import read_header
from besa_exp.checkpoints.load import LoadedModel, hub_id, load_model
from besa_exp.checkpoints.narrowed_model import padded_model
from besa_exp.checkpoints.shards import saved_state, shard_names, write_index, write_shards
from besa_exp.checkpoints.streaming import saves_blocks_anew
from besa_exp.checkpoints.tensor_sources import as_saved
from besa_exp.display.model_card import base_licence, model_card
from besa_exp.errors import RunError
from besa_exp.machine import atomic, distributed
from besa_exp.machine.disk import ONE_FILE
from besa_exp.machine.environment import environment
from besa_exp.run_folder.finished_blocks import FinishedBlocks
from besa_exp.run_folder.inputs import fingerprint_of_run, write_inputs
from besa_exp.run_folder.status import own_command
from besa_exp.runs.cpu_units import as_stored, in_a_fast_dtype
from besa_exp.runs.results import attempt_of, results_of
from besa_exp.runs.run import Run, Work, num_blocks
from besa_exp.settings import RunSettings
from besa_exp.tensors.masks import Goal


def by_block(settings: RunSettings, work: Work) -> bool:
    """Whether the saved model has a file for each block, the finished block's: a streamed one, and one that would take
    several files and that the finished blocks are the newest of."""
    model = work.loaded.model
    if work.loaded.weights is not None:
        return True
    newest = work.recovery is None and _saved_as(settings) is None and not saves_blocks_anew(model)
    return newest and sum(parameter.nbytes for parameter in model.parameters()) > ONE_FILE


def save_pruned(loaded: LoadedModel, finished: FinishedBlocks, folder: Path, card: str, linked: bool = False) -> None:
    """Writes the pruned model to `folder`: from memory, or, when it is streamed or `linked`, from the finished blocks'
    files.

    RunError: the disk is full or cannot be written to; the finished blocks stay."""
    if loaded.weights is None:
        held = loaded.model.state_dict(keep_vars=True)  # without what no file holds, as tables of positions
        for tensor in held.values():
            tensor.data = as_stored({"": tensor.data}, loaded.stored)[""]
    if loaded.weights is None and not linked:
        save_model(loaded.model, loaded.tokenizer, folder, card, loaded.folder)
        return
    again = "free disk space, then run the same command again, or set save.model=false"
    told = atomic.writing(f"{folder} could not be written", f"the pruned blocks are kept: {again}")
    with told, atomic.replaced_folder(folder) as partial:
        _write_shards(loaded, finished, partial)
        save_beside_weights(loaded.model, loaded.tokenizer, partial, card, loaded.folder)


def check_saved(saved: LoadedModel, reports: Sequence[BlockReport], padded: bool = False) -> None:
    """RunError: a linear of the model that was saved and loaded again has another number of zeros than was reported,
    beside those that pad it, or there are other blocks. The reports are in the order of the saved blocks, whatever
    their numbers."""
    blocks = saved.blocks()
    if len(blocks) != len(reports):
        raise RunError(f"{saved.folder}: {len(blocks)} blocks as saved, not the {len(reports)} that were reported")
    for block in saved.resident(blocks):
        for linear in reports[block.index].linears:
            weight = block.linears[linear.name].weight
            padding = weight.numel() - linear.weights if padded else 0
            zeros = weight.numel() - int(torch.count_nonzero(weight)) - padding
            if (zeros, weight.numel() - padding) != (linear.pruned, linear.weights):
                raise RunError(
                    f"{saved.folder}: {block.name}.{linear.name} holds {zeros} zeros of {weight.numel()} as saved, not "
                    f"the {linear.pruned} of {linear.weights} that were reported"
                )


def pruned_weights(
    loaded: LoadedModel, finished: FinishedBlocks, done: int | None = None, others: Sequence[Path] = ()
) -> LoadedModel:
    """The streamed model with the files of the `done` first finished blocks, by default all, and `others` in place of
    its own."""
    assert loaded.weights is not None
    files = [*finished.weight_files(num_blocks(loaded) if done is None else done), *others]
    return replace(loaded, weights=loaded.weights.with_blocks(loaded.model, files))


def masks_origin(settings: RunSettings, work: Work) -> dict[str, Any]:
    """What a run's masks were made from and how, for `rebuild`. Of a folder the name alone: the rest is private.

    `dtype` is what the model was loaded as, `layout` how its pruned weights are dealt out to files; `structure` and
    `recovery`, where there were any: masks and dense weights do not give such a model."""
    loaded, later = work.loaded, {"structure": work.structure, "recovery": work.recovery}
    of_stages = {name: report.to_dict() for name, report in later.items() if report}
    return of_stages | {
        "model": settings.model.path.rstrip("/").rpartition("/")[2],
        "dtype": settings.model.dtype,
        "layout": "streamed" if by_block(settings, work) else "whole",
        "outside_sha256": weights_sha256(outside_blocks(loaded)),
        "method": settings.pruner_name,
        "pattern": settings.pattern,
        "sparsity": Goal.parse(settings.sparsity, settings.pattern).sparsity,
        "seed": settings.seed,
    }


def outside_blocks(loaded: LoadedModel) -> dict[str, Tensor]:
    """The tensors of the model that are in no block, as they are saved."""
    prefix = f"{discover_blocks(loaded.model)[0]}."
    outside = {name: tensor for name, tensor in loaded.model.state_dict().items() if not name.startswith(prefix)}
    return as_stored(outside, loaded.stored)


def _write_shards(loaded: LoadedModel, finished: FinishedBlocks, folder: Path) -> None:
    """One shard for what is outside the blocks, one for each block, and the index of them all."""
    prefix = f"{discover_blocks(loaded.model)[0]}."
    if loaded.weights:
        held = loaded.weights.read_outside(prefix)
    else:
        held = {name: tensor for name, tensor in saved_state(loaded.model).items() if not name.startswith(prefix)}
    blocks = finished.weight_files(num_blocks(loaded))
    files = shard_names(len(blocks) + 1)
    outside = as_saved(loaded.model, held)
    write_shards(folder, {files[0]: list(outside)}, [outside])
    for source, file in zip(blocks, files[1:], strict=True):
        _write_block(loaded.model, source, folder / file)
    write_index(folder, files, loaded.model.num_parameters())


def _write_block(model: PreTrainedModel, source: Path, target: Path) -> None:
    """A finished block's file as part of the saved model, where transformers may have other names and shapes for it."""
    names = read_header(source)[0].keys()
    bare = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    if as_saved(model, bare).keys() == names:
        _link(source, target)
        return
    saved = as_saved(model, load_file(source))
    write_shards(target.parent, {target.name: list(saved)}, [saved])


def _link(source: Path, target: Path) -> None:
    """The same file under two names where the file system can; else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def save(run: Run, work: Work) -> Work:
    """The stage: what is to be kept is saved; then the pruned model is the one that was saved, loaded again and its
    zeros counted."""
    settings, folder, loaded = run.settings, run.folder, work.loaded
    with run.spent.timed("save"):
        if settings.save.model:
            run.console.stage("saving the model and reading it back")
        if distributed.is_first():
            _write_model(run, work)
        distributed.barrier()
        if not settings.save.model:
            return replace(work, saved=loaded)
        if settings.save.verify and distributed.is_first():  # what the saved model is to have in a fresh process
            with loaded.callable():
                expected = token_loss(loaded.model, work.calibration.input_ids[:1, :TOKENS])
            work = replace(work, token_loss=expected)
        torch.nn.Module.to(loaded.model, "meta")  # two models may be more than the device holds
        load = "streamed" if loaded.weights else "whole"
        saved = replace(settings.model, path=str(folder.model), revision=None, dtype="auto", load=load)
        saved = replace(saved, trust_remote_code=_runs_code(settings))
        reloaded = replace(load_model(saved, run.device, offline=True), tokenizer=loaded.tokenizer)
        check_saved(reloaded, work.reports, _saved_as(settings) == "padded")
        return replace(work, saved=in_a_fast_dtype(reloaded, settings.model.dtype))


def _saved_as(settings: RunSettings) -> str | None:
    """How blocks of uneven widths are saved; None: there are none."""
    return settings.structure.saved_as if settings.structure else None


def _runs_code(settings: RunSettings) -> bool:
    """Whether the saved model is loaded with the code that lies beside it, the user's or the project's own."""
    return settings.model.trust_remote_code or _saved_as(settings) == "custom_code"


@contextmanager
def reread(run: Run, work: Work) -> Iterator[Callable[[], dict[str, Any]]]:
    """Starts to load the saved model in a fresh process; call what is yielded to wait for it and to get its part of
    results.json."""
    save, loaded = run.settings.save, work.loaded
    if not save.model or not distributed.is_first():
        yield dict
        return
    if not save.verify:
        yield lambda: {"reloaded": {"skipped": "save.verify=false"}}
        return
    dtype, trusted = loaded.stored or loaded.model.dtype, _runs_code(run.settings)
    routes = any(linear.of_mixture for linear in discover_linears(discover_blocks(loaded.model)[1][-1]).values())
    tokens, expected = work.calibration.input_ids[:1, :TOKENS], work.token_loss
    assert expected is not None
    with reloading(run.folder.model, tokens, expected, dtype, trusted, routes) as answer:

        def reloaded() -> dict[str, Any]:
            run.console.stage("checking that transformers loads the saved model")
            with run.spent.timed("save"):
                return {"reloaded": answer()}

        yield reloaded


def _write_model(run: Run, work: Work) -> None:
    settings, folder, loaded = run.settings, run.folder, work.loaded
    if settings.save.masks:
        merge_masks(work.finished.mask_files(len(work.reports)), folder.masks, masks_origin(settings, work))
    if settings.save.model:
        results = results_of(settings, work, environment(run.device))
        if _saved_as(settings) == "padded":
            loaded = replace(loaded, model=padded_model(loaded.model))
        linked = by_block(settings, work)
        save_pruned(loaded, work.finished, folder.model, card(run, loaded.folder, results), linked)


def card(run: Run, source: Path, results: Mapping[str, Any], base: str | None = None) -> str:
    """The model card, with the licence of the dense model's folder `source`; a model that is neither embedded nor a
    folder is named by its hub id, another by that of its `base`."""
    model = run.settings.model
    return model_card(results, own_command(), hub_id(model) or base, model.revision, base_licence(source))


def written(run: Run, source: Path, results: Mapping[str, Any], base: str | None = None) -> dict[str, Any]:
    """results.json with times and memory, which model its scores are of, the model card (see `card`) with the scores,
    and the tables."""
    spent = {"seconds": run.spent.seconds(), "peak_memory_bytes": run.spent.peak_memory()}
    complete = {**results, **spent, **attempt_of(run.folder.path)}
    run.folder.write_results(complete)
    if distributed.is_first():
        write_inputs(run.folder.path, fingerprint_of_run(run.folder.path))
    if run.settings.keeps_model and distributed.is_first():
        write_card(run.folder.model, card(run, source, complete, base))
    run.console.summary(complete, run.folder.path)
    return complete
