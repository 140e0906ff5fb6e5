"""ShortGPT against its authors' code: block influence of each token, orders, and scores after removal."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from neighbours import recorded, recorded_model, recorded_tokens, test_nll

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.checkpoints.narrowed_model import costs_of_model, narrowed_model
from besa_exp.checkpoints.structure import Structure
from besa_exp.methods.structure.shortgpt import ShortGPT, angular_distance, block_influence, least_influential, passage


@pytest.fixture(scope="module")
def run(shared_dir):
    return *recorded(shared_dir, "shortgpt"), recorded_model(shared_dir), *recorded_tokens(shared_dir)


def states(model, ids, last_norm=False):
    """The embeddings and each block's output; with `last_norm`, as in the authors' code, the last one is normed."""
    blocks = capture_blocks(model, ids)
    found = [embed(model, blocks, ids, len(ids))]
    for block in blocks:
        found.append(block.outputs(found[-1], len(ids)))
    return [*found[:-1], model.model.norm(found[-1])] if last_norm else found


def influences(model, ids, last_norm=False):
    found = states(model, ids, last_norm)
    return torch.stack([block_influence(*pair) for pair in pairwise(found)])


@pytest.mark.parametrize(("last_norm", "name"), [(False, "bi_per_token_true_block_output"), (True, "bi_per_token")])
def test_block_influence_of_each_token_is_the_recorded_one(run, last_norm, name):
    _, tensors, model, ids, _ = run
    gap = (influences(model, ids, last_norm) - tensors[name]).abs()
    assert float(gap.max()) < 4.2e-7  # the record is fp32: 1 - cos in fp64 of fp64 states is 4.1e-7 from it
    assert float(gap.mean()) < 1e-7


def test_one_pass_gives_the_mean_influence_whatever_the_batches(run):
    told, _, model, ids, _ = run
    blocks = capture_blocks(model, ids)
    for batch_size in (16, 5):
        found = passage(blocks, embed(model, blocks, ids, 16), batch_size)
        assert found.influence.tolist() == pytest.approx(told["mean_bi_true_block_output"], abs=4e-7)


def padded_influences(model, ids):
    """Of two rows, the second 20 tokens long, in windows of 16: paddings beside tokens are counted, and a window of
    paddings alone is left out."""
    rows, mask = ids[:2].clone(), torch.ones_like(ids[:2])
    rows[1, 20:], mask[1, 20:] = 2, 0
    windows = [
        (rows[row : row + 1, s : s + 16], mask[row : row + 1, s : s + 16]) for row in (0, 1) for s in (0, 16, 32)
    ]
    found = []
    with torch.no_grad():
        for window, kept in windows[:5]:
            states = model(window, attention_mask=kept, output_hidden_states=True, use_cache=False).hidden_states
            found.append(torch.stack([block_influence(*pair) for pair in pairwise(states)]))
    return torch.cat(found, dim=1)


def test_sums_orders_and_scores_are_the_recorded_ones_for_each_way_of_feeding(run):
    told, _, model, ids, test_ids = run
    for name, case in told["cases"].items():
        padded = name == "padded_pair_stride16"
        found = padded_influences(model, ids) if padded else influences(model, ids.view(-1, case["stride"]), True)
        found = found.double().sum(dim=(1, 2))
        assert found.tolist() == pytest.approx(case["importances"], rel=4e-6), name
        assert least_influential(found, 4) == case["pruning_order"]
        assert least_influential(found, case["n_prune_layers"]) == case["removed"]
        structure = Structure(tuple(block for block in range(4) if block not in case["removed"]))
        nll = test_nll(narrowed_model(model, structure), test_ids)
        assert nll == pytest.approx(case["test_nll_after"], abs=2e-6)


def test_angular_distance_is_the_recorded_one(run):
    told, _, model, ids, _ = run
    found = states(model, ids, last_norm=True)
    means = [float(angular_distance(*pair).double().mean()) for pair in pairwise(found)]
    assert means == pytest.approx(told["angular_mean"], abs=4e-6)


def test_the_blocks_that_go_are_the_recorded_ones(run):
    told, _, model, ids, _ = run
    blocks = capture_blocks(model, ids)
    found = passage(blocks, embed(model, blocks, ids, 16), 16)
    for case in told["cases"].values():
        removed, _ = ShortGPT(blocks=case["n_prune_layers"]).removed(found, costs_of_model(model))
        assert sorted(removed) == sorted(case["removed"])
