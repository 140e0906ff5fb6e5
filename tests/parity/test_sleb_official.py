"""SLEB against its authors' code: every trial's loss, the order of removal, and the score of what is left."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from neighbours import recorded, recorded_model, recorded_tokens, test_nll

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.head import head_of, summed_entropies
from besa_exp.checkpoints.narrowed_model import costs_of_model, narrowed_model
from besa_exp.methods.structure.shortgpt import without
from besa_exp.methods.structure.sleb import Sleb


@pytest.mark.parametrize("barriers", [(1, 1, 2), (0, 0, 3), (0, 1, 2)])
def test_every_trials_loss_and_the_order_are_the_authors(shared_dir, barriers):
    early, latter, count = barriers
    told, _ = recorded(shared_dir, "sleb")
    case = told["cases"][f"early{early}_latter{latter}_remove{count}"]
    model = recorded_model(shared_dir)
    ids, test_ids = recorded_tokens(shared_dir)
    blocks = capture_blocks(model, ids)
    head = head_of(model, blocks, ids)
    tokens = len(ids) * (ids.shape[1] - 1)
    method = Sleb(count, early_barrier=early, latter_barrier=latter, loss="cross_entropy")
    inputs, loss_of = embed(model, blocks, ids, len(ids)), partial(summed_entropies, head, ids)
    found = [*method.search(lambda: blocks, inputs, costs_of_model(model), 16, loss_of, tokens)]
    assert [removal.block for removal in found] == case["removal_order"]
    gone: list[int] = []
    trials = {}
    for removal in found:
        trials |= {tuple(sorted([*gone, block])): loss for block, loss in removal.losses.items()}
        gone.append(removal.block)
    assert len(trials) == len(case["trace"])
    for trial in case["trace"]:
        assert trials[tuple(sorted(trial["off"]))] == pytest.approx(trial["mean_nll"], rel=1e-6)
    small = narrowed_model(model, without(gone, 4))
    assert test_nll(small, test_ids) == pytest.approx(case["test_nll_after"], abs=2e-6)
    with torch.no_grad():
        hidden = embed(model, blocks, ids, len(ids))
        assert float(loss_of([blocks[-1].outputs(hidden, 16)])) > 0
