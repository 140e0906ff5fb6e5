"""SIMULATED speed of a pruned model on a sparse accelerator: a cycle model, nothing is measured.

The model is that of ViTCoD (You et al., arXiv 2210.09573) as BESA's authors use it (arXiv 2402.16880, hw_sim/): an
array of 64 x 64 multipliers applies a linear to one input vector. Columns in which more than `threshold` of the weights
are kept count as dense and go through one part of the array, zeros and all; of the other columns only the kept weights
go through the other part. The width of the array is split in proportion to the work, and the slower part decides:

    cycles = max(ceil(rows * dense columns / (64 * dense width)), ceil(kept in sparse columns / (64 * sparse width)))

The threshold starts at 0.5 and moves by 0.1, four times at most, until dense columns hold 40 to 60 % of the kept; the
fewest cycles count. A matrix with more inputs than outputs is cut into square patches, one after the other.

The authors' code differs where it is wrong for other shapes: it takes inputs * dense columns for the dense
part's work, right in square matrices only, cuts down_proj by its name, and lets dense columns pass for nothing where
their share of the width rounds to zero (here they have a width of one). So it counts too few cycles elsewhere, most of
all with nothing pruned: of LLaMA 7B 4,096 for gate and up and 10,128 for down, where each has 11,008 here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from besa_exp.blocks.sparsity_table import linear_type

if TYPE_CHECKING:
    from besa_exp.checkpoints.load import LoadedModel

ARRAY = 64  # multipliers, in height and in width
MODEL = "simulated, not measured: ViTCoD cycle model, 64 x 64 array, one input vector"


class Cycles(NamedTuple):
    """Simulated array cycles of a linear with all its weights, and of it as it is pruned."""

    dense: int
    sparse: int


def simulated_cycles(keep_mask: Bool[Tensor, "out in"]) -> Cycles:
    """The simulated cycles for one input vector. Both counts are of the same patches."""
    rows, columns = keep_mask.shape
    kept = keep_mask.sum(dim=0, dtype=torch.int32)
    patches = kept.split(rows) if columns > rows else (kept,)
    dense = sum(_divided(rows * len(patch), ARRAY * ARRAY) for patch in patches)
    return Cycles(dense, sum(_patch_cycles(patch, rows) for patch in patches))


def _patch_cycles(kept: Int[Tensor, " in"], rows: int) -> int:
    """The fewest cycles over the thresholds tried, in tenths of a column. `kept` counts each column's weights."""
    total, threshold, fewest = int(kept.sum()), 5, 0
    for attempt in range(5):
        is_dense = 10 * kept > threshold * rows
        in_dense = int(kept[is_dense].sum())
        cycles = _cycles(rows * int(is_dense.sum()), total - in_dense)
        fewest = min(fewest, cycles) if attempt else cycles
        if 4 * total < 10 * in_dense < 6 * total:
            break
        threshold += 1 if 10 * in_dense >= 6 * total else -1
    return fewest


def _cycles(dense_work: int, sparse_work: int) -> int:
    """Of an array shared in proportion to the work, whole columns of it, at least one for each part that has any."""
    if not dense_work or not sparse_work:
        return _divided(dense_work + sparse_work, ARRAY * ARRAY)
    width = max(ARRAY * dense_work // (dense_work + sparse_work), 1)
    return max(_divided(dense_work, ARRAY * width), _divided(sparse_work, ARRAY * (ARRAY - width)))


def _divided(work: int, by: int) -> int:
    return -(-work // by)


def simulated_speed(weights: Iterable[tuple[str, Tensor]]) -> dict[str, dict[str, float | None]]:
    """SIMULATED figures by linear type, and of `all`: mean cycles of a linear (`dense_cycles` with all weights,
    `sparse_cycles` as it is), `speed_up`, their quotient (None: nothing is left to compute), and `sparsity`.

    `weights` are (path in its block, [out, in])."""
    sums: dict[str, list[int]] = {}
    for name, weight in weights:
        cycles = simulated_cycles(weight != 0)
        row = [1, *cycles, weight.numel(), int((weight == 0).sum())]
        for kind in (linear_type(name), "all"):
            sums[kind] = [old + new for old, new in zip(sums.get(kind, [0] * len(row)), row, strict=True)]
    sums |= {"all": sums.pop("all")} if sums else {}
    return {
        kind: {
            "dense_cycles": dense / linears,
            "sparse_cycles": sparse / linears,
            "speed_up": dense / sparse if sparse else None,
            "sparsity": pruned / numel,
        }
        for kind, (linears, dense, sparse, numel, pruned) in sums.items()
    }


@torch.no_grad()
def simulate_model(loaded: LoadedModel) -> dict[str, Any]:
    """SIMULATED: `model` says by what, `linears` are the rows of `simulated_speed` for all linears in the blocks."""
    weights = ((name, linear.weight) for block in loaded.resident() for name, linear in block.linears.items())
    return {"model": MODEL, "linears": simulated_speed(weights)}
