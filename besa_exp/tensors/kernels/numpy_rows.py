"""numpy's sorts of rows on a CPU. They use its vectors, which torch's do not: sorting int64 is 6 x faster than torch's
argsort of fp32. numpy has one thread; rows are dealt out to as many as PyTorch has."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

FEW = 1 << 18  # numbers that one thread sorts before others have begun, and that stay in its cache


def sort_rows_(values: Int64[Tensor, "row column"]) -> None:
    """Each row in ascending order, in place."""
    _in_threads(lambda rows: rows.sort(axis=1), values.numpy())


def in_order(values: Float[Tensor, "row column"], place: int) -> Float[Tensor, "row 1"]:
    """What would stand at `place` of each row if it were sorted; NaN would come last."""
    found = torch.empty(len(values), 1, dtype=values.dtype)

    def find(rows: np.ndarray, into: np.ndarray) -> None:
        parts = max(1, rows.size // FEW)
        for few, places in zip(np.array_split(rows, parts), np.array_split(into, parts), strict=True):
            places[:] = np.partition(few, place, axis=1)[:, place : place + 1]

    _in_threads(find, values.numpy(), found.numpy())
    return found


def _in_threads(act: Callable[..., None], *values: np.ndarray) -> None:
    """`act` on parts of the rows of `values`."""
    threads = min(torch.get_num_threads(), len(values[0])) if values[0].size > FEW else 1
    if threads < 2:
        act(*values)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(act, *(np.array_split(each, threads) for each in values)))
