"""How sparse each row of each linear is, BESA's own output, as the masks of the finished blocks say.

    sparsity of row i = pruned weights of row i / weights of row i

All of them lie in one file of the run folder, float32 by the linear's name in the model; metrics.jsonl has quantiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor

from besa_exp.blocks.reports import BlockReport
from besa_exp.checkpoints.files import load_masks
from besa_exp.machine import atomic
from besa_exp.run_folder.finished_blocks import FinishedBlocks
from besa_exp.runs.run import Run

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def row_sparsities(keep_mask: Bool[Tensor, "out in"]) -> Float[Tensor, " out"]:
    return 1 - keep_mask.sum(dim=1, dtype=torch.int32).float() / keep_mask.shape[1]


def keep_row_sparsities(run: Run, finished: FinishedBlocks, reports: Sequence[BlockReport]) -> None:
    """Writes the file, and logs each block's to metrics.jsonl and the tracker. For the first of several ranks."""
    found: dict[str, Tensor] = {}
    for report, file in zip(reports, finished.mask_files(len(reports)), strict=True):
        rows = {name.removesuffix(".weight"): row_sparsities(mask) for name, mask in load_masks(file).items()}
        found |= rows
        paths = [linear.name for linear in report.linears]
        by_path = {path: own for path in paths for name, own in rows.items() if name.endswith(f".{path}")}
        at = torch.tensor(QUANTILES)  # linear between two rows
        run.folder.log_rows(report.index, {path: torch.quantile(own, at).tolist() for path, own in by_path.items()})
        run.tracker.log_rows(report.index, {path: own.tolist() for path, own in by_path.items()})
    with atomic.replaced_file(run.folder.rows) as partial:
        save_file(found, partial)
