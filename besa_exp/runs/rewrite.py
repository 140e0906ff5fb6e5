"""The seam for what changes the weights of the whole pruned model after the block loop, its zeros kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from besa_exp.blocks.block import Block, capture_blocks
from besa_exp.blocks.reports import BlockReport, LinearReport
from besa_exp.checkpoints.files import load_masks, masks_description
from besa_exp.errors import RunError
from besa_exp.machine import distributed
from besa_exp.recovery.keep_bits import KeepBits, masks_of_keep
from besa_exp.run_folder.finished_blocks import block_tensors
from besa_exp.run_folder.identity import IDENTITY
from besa_exp.runs.block_loop import resident
from besa_exp.runs.cpu_units import as_stored
from besa_exp.runs.run import Work
from besa_exp.runs.save import pruned_weights


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
    done: list[BlockReport] = []
    if writes:
        identity = json.loads((before.folder / IDENTITY).read_text(encoding="utf-8"))
        done = distributed.from_first(lambda: into.begin(identity))
    if loaded.weights:
        loaded = pruned_weights(loaded, into, len(done))
    reports = []
    for block in resident(loaded, capture_blocks(loaded.model, torch.zeros(1, 1, dtype=torch.long))):
        if block.index >= len(done):
            change(block)
        file = before.mask_files(len(work.reports))[block.index]
        masks = load_masks(file)
        if keep is not None:
            masks = {
                name: mask for name, mask in masks_of_keep(block.name, block.linears, keep).items() if name in masks
            }
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


def _recounted(block: Block, report: BlockReport) -> BlockReport:
    """A kept weight may have become zero."""
    linears = tuple(
        LinearReport(linear.name, linear.weights, _zeros(block, linear.name), linear.allocated)
        for linear in report.linears
    )
    return replace(report, linears=linears)


def _zeros(block: Block, name: str) -> int:
    weight = block.linears[name].weight
    return weight.numel() - int(weight.bool().count_nonzero())


def _check_zeros(block: Block, masks: Mapping[str, Tensor]) -> None:
    """Of the linears that have a mask: others were kept dense."""
    for name, linear in block.linears.items():
        keep_mask = masks.get(f"{block.name}.{name}.weight", torch.ones((), dtype=torch.bool)).to(linear.weight.device)
        if filled := int((linear.weight.detach().bool() & ~keep_mask).sum()):
            raise RunError(f"{block.name}.{name}: {filled} pruned weights are not zero after the recovery")
