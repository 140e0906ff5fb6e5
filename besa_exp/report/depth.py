"""Along depth: what each block's linears give up, and the reconstruction error each method leaves there."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from besa_exp.blocks.sparsity_table import short_names, type_counts
from besa_exp.report.comparability import RECONSTRUCTION, Entry
from besa_exp.report.methods import Method
from besa_exp.report.runs import RunRecord
from besa_exp.report.summaries import cells


@dataclass(frozen=True)
class Allocation:
    """Weights and pruned weights by block (rows) and linear type (columns, in the model's order); None where a block
    has no such linear."""

    linears: tuple[str, ...]
    blocks: tuple[int, ...]
    counts: tuple[tuple[tuple[int, int] | None, ...], ...]

    @property
    def sparsities(self) -> list[list[float]]:
        """Fraction of zeros; NaN where a block has no such linear."""
        return [[pair[1] / pair[0] if pair else float("nan") for pair in row] for row in self.counts]


def allocation(run: RunRecord) -> Allocation:
    """Experts of one kind are one linear type."""
    by_block = [type_counts([block.to_dict()]) for block in run.blocks]
    names = short_names(dict.fromkeys(kind for own in by_block for kind in own))
    rows = tuple(tuple(own.get(kind) for kind in names) for own in by_block)
    return Allocation(tuple(names.values()), tuple(block.index for block in run.blocks), rows)


@dataclass(frozen=True)
class ErrorAlongDepth:
    """Mean and sample standard deviation over `number` runs of the reconstruction loss after each block."""

    model: str
    method: Method
    target: float
    blocks: tuple[int, ...]
    means: tuple[float, ...]
    spreads: tuple[float, ...]
    number: int


def errors_along_depth(runs: Sequence[RunRecord], judged: Sequence[Entry]) -> list[ErrorAlongDepth]:
    """One for each model, method and target whose runs are comparable."""
    losses = [entry for entry in judged if entry.measure == RECONSTRUCTION and not entry.apart]
    found = []
    for cell in cells(runs, losses):
        chosen = [runs[number].blocks for number in cell.runs]
        columns: dict[int, list[float]] = {}  # by block; runs may have removed different ones
        for block in (block for blocks in chosen for block in blocks):
            columns.setdefault(block.index, []).append(block.loss_after)
        indices = tuple(sorted(columns))
        means = tuple(statistics.fmean(columns[index]) for index in indices)
        spreads = tuple(statistics.stdev(columns[i]) if len(columns[i]) > 1 else 0.0 for i in indices)
        found.append(ErrorAlongDepth(cell.model, cell.method, cell.target, indices, means, spreads, len(chosen)))
    return found
