"""The seam for what changes the weights of the whole pruned model after the block loop, its zeros kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from besa_exp.blocks.block import Block
from besa_exp.blocks.reports import BlockReport, LinearReport
from besa_exp.checkpoints.files import load_masks, masks_description
from besa_exp.errors import RunError
from besa_exp.machine import distributed
from besa_exp.recovery.keep_bits import masks_of_keep
from besa_exp.run_folder.finished_blocks import block_tensors
from besa_exp.runs.cpu_units import as_stored
from besa_exp.runs.run import Work
from besa_exp.runs.save import pruned_weights
from besa_exp.tensors.keep_bits import KeepBits


def rewritten(
    work: Work,
    change: Callable[[Block], None],
    outside: Mapping[str, Tensor] | None = None,
    keep: Mapping[str, KeepBits] | None = None,
) -> Work:
    """The work after `change` has moved the weights of each block in place, zeros counted again, and `outside` has
    replaced tensors that are in no block, by their names in the model. `keep`: where zeros were moved about, what is
    kept now.

    A model that is held whole may have been changed before; then `change` does nothing. Of a streamed one the blocks
    come one by one with their pruned weights, and lie in `finished.recovered` afterwards, as those with other zeros do;
    those that an earlier attempt has left there are taken as they are. RunError: a pruned weight is not zero any
    more."""
    loaded, before = work.loaded, work.finished
    into, writes = before.recovered, work.loaded.weights is not None or keep is not None
    loaded.model.load_state_dict(outside or {}, strict=False)
    done = distributed.from_first(into.begin) if writes else []
    if loaded.weights:
        loaded = pruned_weights(loaded, into, len(done))
    reports = []
    for block in loaded.resident():
        if block.index >= len(done):
            change(block)
        file = before.mask_file(block.index)
        masks = _masks(block, load_masks(file), keep)
        report = _recounted(block, work.reports[block.index])
        reports.append(report)
        _check_zeros(block, masks)
        if writes and block.index >= len(done) and distributed.is_first():
            tensors = as_stored(block_tensors(block.module, block.name), loaded.stored)
            into.write(report, tensors, masks, masks_description(file)["dense_sha256"], True)
    if not writes:
        return replace(work, reports=tuple(reports))
    if outside and distributed.is_first():
        into.write_outside(as_stored(dict(outside), loaded.stored))
    distributed.barrier()  # the first rank has written the files
    if loaded.weights:
        loaded = pruned_weights(loaded, into, others=[into.outside] if outside else [])
    return replace(work, loaded=loaded, finished=into, reports=tuple(reports))


def _masks(block: Block, before: Mapping[str, Tensor], keep: Mapping[str, KeepBits] | None) -> Mapping[str, Tensor]:
    """The block's, of the linears that had one before."""
    if keep is None:
        return before
    now = masks_of_keep(block.name, block.linears, keep)
    return {name: now[name] for name in before}


def _recounted(block: Block, report: BlockReport) -> BlockReport:
    """A kept weight may have become zero."""
    linears = (LinearReport.counted(own.name, block.linears[own.name].weight, own.allocated) for own in report.linears)
    return replace(report, linears=tuple(linears))


def _check_zeros(block: Block, masks: Mapping[str, Tensor]) -> None:
    """Of the linears that have a mask: others were kept dense."""
    for name, linear in block.linears.items():
        keep_mask = masks.get(f"{block.name}.{name}.weight", torch.ones((), dtype=torch.bool)).to(linear.weight.device)
        if filled := int((linear.weight.detach().bool() & ~keep_mask).sum()):
            raise RunError(
                f"{block.name}.{name}: {filled} pruned weights are not zero after the recovery; a "
                "method tunes Kept.of(value, keep.get(name)), which leaves them"
            )
