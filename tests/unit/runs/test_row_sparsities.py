"""Row sparsities: counted from masks, told as quantiles."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from besa_exp.report.curves import row_quantiles
from besa_exp.runs.prune_model import row_sparsities


def test_a_rows_sparsity_is_the_share_of_it_that_is_pruned() -> None:
    keep_mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]).bool()
    assert row_sparsities(keep_mask).tolist() == [0.0, 0.5, 0.75]


def test_quantiles_are_read_back_in_the_order_of_blocks_and_a_cut_off_line_hides_none(tmp_path: Path) -> None:
    lines = [{"kind": "rows", "block": block, "linears": {"up": [0.1] * 7}} for block in (1, 0)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(f'{{"kind": "step"}}\n{text}{{"kind": "rows", "block": 2, "lin')
    assert [row["block"] for row in row_quantiles(tmp_path)] == [0, 1]
    assert row_quantiles(tmp_path / "nowhere") == []
