"""The stage that takes whole parts out of the dense model: blocks, groups of heads, channels.

What was decided stands in structure.json, what was measured on the way in structure_search.json; a run that was killed
goes on with either. A model in memory is narrowed there; a streamed one is written to `narrowed/` block by block and
streamed from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.head import head_of
from besa_exp.blocks.ignored import Ignored
from besa_exp.blocks.reports import Narrowed, Removed, Size, StructureReport
from besa_exp.checkpoints.load import LoadedModel, load_model, model_context
from besa_exp.checkpoints.narrowed_config import family_problems
from besa_exp.checkpoints.narrowed_model import (
    STRUCTURE_FILE,
    costs_of_model,
    dimensions_of_model,
    narrow_folder,
    narrowed_model,
)
from besa_exp.checkpoints.structure import Costs, Dimensions, Structure, from_json, to_json
from besa_exp.errors import ConfigurationError
from besa_exp.evaluation.cost import counts_of as cost_counts
from besa_exp.machine import atomic, distributed
from besa_exp.machine.device import compute_dtype
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.structure.method import DenseModel, StructureMethod, check_chosen
from besa_exp.runs.block_loop import inputs_of
from besa_exp.runs.run import Run, Work, parameters, weights_in_linears
from besa_exp.tensors.pattern import indivisible


def narrow(run: Run, work: Work) -> Work:
    """The stage: what is left of the dense model, as a model of its own. ConfigurationError: it cannot be narrowed so;
    no weight of a block was changed."""
    if run.settings.structure is None:
        return work
    loaded = work.loaded
    dimensions, costs = dimensions_of_model(loaded.model), costs_of_model(loaded.model)
    config, streamed = loaded.model.config.to_dict(), bool(loaded.weights)
    if problems := check_narrowing(run.settings.structure, config, dimensions, costs, streamed):
        raise ConfigurationError(*problems)
    with run.spent.timed("structure"):
        structure = _structure(run, work, costs, dimensions)
        try:
            narrower = _narrowed(run, loaded, structure, dimensions)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
    pattern, ignored = run.settings.pattern, Ignored(run.settings.ignore, structure.blocks)
    remedy = f"structure={_name(run)} left them so: set structure.multiple={pattern.rpartition(':')[2]}"
    if problems := indivisible(inputs_of(map(ignored.rest, narrower.blocks())), pattern, remedy):
        raise ConfigurationError(*problems)
    report = report_of(_name(run), loaded, narrower, structure, costs, dimensions)
    report = replace(report, saved_as=run.settings.structure.saved_as)
    assert report.parameters.left == parameters(narrower), "what is left is counted twice"
    run.console.stage(_summary(report))
    cost = cost_counts(loaded.model, model_context(loaded.model))
    return replace(work, loaded=narrower, structure=report, parameters=report.parameters, dense_cost=cost)


def report_of(
    method: str,
    dense: LoadedModel,
    narrower: LoadedModel,
    structure: Structure,
    costs: Costs,
    dimensions: Dimensions,
) -> StructureReport:
    """What was taken out of each block, in parameters and by number."""
    changes = [_change(block, structure, costs, dimensions) for block in range(dimensions.blocks)]
    return StructureReport(
        method,
        dimensions.blocks,
        tuple(change for change in changes if change is not None),
        Size(weights_in_linears(dense), weights_in_linears(narrower)),
        Size(costs.total, structure.parameters_left(costs, dimensions)),
    )


def _change(block: int, structure: Structure, costs: Costs, dimensions: Dimensions) -> Narrowed | Removed | None:
    """None: the block stays whole."""
    if block not in structure.by_block:
        return Removed(block, costs.blocks[block])
    groups = len(structure.kept_groups(block, dimensions))
    channels = len(structure.kept_channels(block, dimensions))
    if (groups, channels) == (dimensions.groups, dimensions.channels):
        return None
    gone = (dimensions.groups - groups) * costs.groups[block] + (dimensions.channels - channels) * costs.channels[block]
    return Narrowed(
        block,
        Size(dimensions.groups, groups),
        Size(dimensions.channels, channels),
        Size(costs.blocks[block], costs.blocks[block] - gone),
    )


def _name(run: Run) -> str:
    """The preset's, which the method's name begins with."""
    return run.settings.pruner_name.split("+")[0]


def _summary(report: StructureReport) -> str:
    gone = [str(change.index) for change in report.changes if isinstance(change, Removed)]
    narrowed = len(report.changes) - len(gone)
    what = [f"{len(gone)} of {report.num_blocks} blocks removed (index {', '.join(gone)})"] if gone else []
    what += [f"{narrowed} of {report.num_blocks} blocks narrowed"] if narrowed else []
    size = report.parameters
    left = f"{size.left:,} of {size.dense:,} parameters left ({size.left / size.dense:.1%})"
    return f"structure: {', '.join(what) or 'nothing goes'}; {left}"


def check_narrowing(
    method: StructureMethod, config: Mapping[str, Any], dimensions: Dimensions, costs: Costs, streamed: bool
) -> list[str]:
    """Why the method cannot take parts out of such a model, in complete sentences."""
    problems = family_problems(config, method.narrows, method.saved_as is not None, streamed)
    return problems or method.check(costs, dimensions)


def _structure(run: Run, work: Work, costs: Costs, dimensions: Dimensions) -> Structure:
    """What was decided before, or is decided now and kept."""
    file = run.folder.structure
    if text := distributed.from_first(lambda: file.read_text(encoding="utf-8") if file.is_file() else ""):
        run.console.stage(f"structure: as {file.name} has it")
        return from_json(text, str(file))
    distributed.from_first(work.finished.begin)  # so that no other request goes on with it
    name = _name(run)
    run.console.stage(f"structure by {name}")
    progress = Progress(run.folder.structure_search, run.spent.keep)
    dense = _dense(run, work, costs, dimensions)
    chosen = run.settings.structure.choose(dense, progress, lambda text: run.console.stage(f"{name}: {text}"))
    check_chosen(run.settings.structure, chosen, dimensions)
    if distributed.is_first():
        run.spent.keep()
        atomic.write_text(file, to_json(chosen, dimensions))
    return chosen


def _dense(run: Run, work: Work, costs: Costs, dimensions: Dimensions) -> DenseModel:
    loaded, batch_size = work.loaded, run.settings.calibration.batch_size
    input_ids = distributed.own_samples(work.calibration.input_ids)
    dtype = compute_dtype(run.settings)
    blocks = [replace(block, compute_dtype=dtype) for block in capture_blocks(loaded.model, input_ids)]
    return DenseModel(
        partial(loaded.resident, blocks),
        lambda: embed(loaded.model, blocks, input_ids, batch_size),
        lambda: head_of(loaded.model, blocks, input_ids),
        input_ids,
        costs,
        dimensions,
        batch_size,
    )


def _narrowed(run: Run, loaded: LoadedModel, structure: Structure, dimensions: Dimensions) -> LoadedModel:
    """The model of what is left, loaded as the dense one is."""
    if loaded.weights is None:
        uneven = run.settings.structure.saved_as is not None
        return replace(loaded, model=narrowed_model(loaded.model, structure, uneven))
    out, settings = run.folder.narrowed, run.settings.model
    run.console.stage("writing what is left, block by block")
    distributed.from_first(lambda: _write(run, loaded, structure, dimensions))
    streamed = replace(settings, path=str(out), revision=None, convert=False, load="streamed")
    return replace(load_model(streamed, run.device, offline=True), tokenizer=loaded.tokenizer, notes=loaded.notes)


def _write(run: Run, loaded: LoadedModel, structure: Structure, dimensions: Dimensions) -> None:
    """Nothing where an earlier attempt has written the same."""
    out = run.folder.narrowed
    beside, text = out / STRUCTURE_FILE, to_json(structure, dimensions)
    if not beside.is_file() or beside.read_text(encoding="utf-8") != text:
        trusted = run.settings.model.trust_remote_code
        narrow_folder(loaded.folder, structure, out, loaded.tokenizer, trust_remote_code=trusted)
