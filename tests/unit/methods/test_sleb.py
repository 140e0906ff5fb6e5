"""SLEB: shared states give the losses of models by themselves, at half the work; resumable; barriers hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from tiny_llama import tiny_llama

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.head import divergence, head_of, summed_divergences, summed_entropies
from besa_exp.checkpoints.narrowed_model import costs_of_model, dimensions_of_model, narrowed_model
from besa_exp.checkpoints.structure import Structure
from besa_exp.errors import RunError
from besa_exp.evaluation.perplexity import sum_of_losses
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.structure.method import DenseModel
from besa_exp.methods.structure.shortgpt import without
from besa_exp.methods.structure.sleb import Removal, Sleb, losses_without

IDS = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(8))


@cache
def parts():
    model = tiny_llama(num_hidden_layers=6, seed=2)
    model.requires_grad_(False)
    blocks = capture_blocks(model, IDS)
    inputs = embed(model, blocks, IDS, 5)
    head = head_of(model, blocks, IDS)
    return model, blocks, inputs, head


def dense_outputs(blocks, inputs):
    for block in blocks:
        inputs = block.outputs(inputs, 5)
    return inputs


def searched(method, done=(), order=lambda blocks: blocks, **kinds):
    model, blocks, inputs, head = parts()
    loss_of = kinds.get("loss_of") or partial(summed_entropies, head, IDS)
    return [*method.search(lambda: order(blocks), inputs, costs_of_model(model), 2, loss_of, 55, done)]


@pytest.mark.parametrize("removed", [(), (2,), (4, 0)])
def test_losses_are_those_of_each_model_by_itself(removed):
    model, blocks, inputs, head = parts()
    before = inputs.clone()
    alive = [block for block in range(6) if block not in removed]
    found, passes = losses_without(blocks, inputs, removed, alive, 2, partial(summed_entropies, head, IDS))
    assert torch.equal(inputs, before)
    for block, loss in found.items():
        left = Structure(tuple(other for other in alive if other != block))
        assert loss == pytest.approx(float(sum_of_losses(narrowed_model(model, left)(IDS).logits, IDS)), rel=1e-6)
    count = len(alive)
    assert passes == count * (count - 1) // 2 + count - 1
    assert found.keys() == {*alive}


def test_a_step_reads_each_block_once_and_evaluates_about_half_of_what_models_by_themselves_do():
    reads = []

    def streamed(blocks):
        for block in blocks:
            reads.append(block.index)
            yield block

    (removal,) = searched(Sleb(1, early_barrier=0, latter_barrier=0), order=streamed)
    assert reads == [0, 1, 2, 3, 4, 5]
    assert removal.passes == 20
    # each of 6 models of 5 blocks by itself would take 30


def test_each_step_removes_the_block_of_least_loss_and_a_resumed_search_goes_on_alike():
    found = searched(Sleb(3, early_barrier=0, latter_barrier=0))
    for removal in found:
        assert removal.losses[removal.block] == min(removal.losses.values())
    for done in range(4):
        again = searched(Sleb(3, early_barrier=0, latter_barrier=0), found[:done])
        assert again == found[done:]
    gone = [removal.block for removal in found]
    assert without(gone, 6).blocks == tuple(sorted({*range(6)} - {*gone}))
    small = narrowed_model(parts()[0], without(gone, 6))
    assert float(sum_of_losses(small(IDS).logits, IDS)) / 55 == pytest.approx(
        found[-1].losses[found[-1].block], rel=1e-6
    )


def test_a_removal_is_read_as_it_was_written():
    found = searched(Sleb(1))[0]
    assert Removal.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    told = replace(found, losses={1: math.nan, 2: 3.5}).to_dict()
    assert told["losses"] == {"1": None, "2": 3.5}  # JSON has no NaN
    assert math.isnan(Removal.from_dict(told).losses[1])


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_losses_that_are_kept_are_nats_a_token(tmp_path, loss):
    """Of 11 predicted tokens a sample, or of the distributions at all 12."""
    model, blocks, inputs, head = parts()
    costs, dimensions = costs_of_model(model), dimensions_of_model(model)
    dense = DenseModel(lambda: blocks, inputs.clone, lambda: head, IDS, costs, dimensions, 2)
    kept = Progress(tmp_path / "search.json")
    structure = Sleb(1, loss=loss).choose(dense, kept, lambda text: None)
    logits, small = model(IDS).logits, narrowed_model(model, structure)(IDS).logits
    expected = sum_of_losses(small, IDS) / (5 * 11) if loss == "cross_entropy" else divergence(logits, small).mean()
    (removal,) = map(Removal.from_dict, kept.read()["removals"])
    assert structure == without([removal.block], 6)
    assert removal.losses[removal.block] == pytest.approx(float(expected), rel=1e-5)


def test_barriers_are_counted_among_the_blocks_that_are_alive():
    assert Sleb(2, early_barrier=1, latter_barrier=2).candidates(6, [1]) == [2, 3]
    assert all(0 not in removal.losses and 5 not in removal.losses for removal in searched(Sleb(3)))


def test_kl_is_the_distance_from_the_dense_models_predictions():
    model, blocks, inputs, head = parts()
    dense = dense_outputs(blocks, inputs)
    assert summed_divergences(head, dense, [dense]).tolist() == [0]
    (removal,) = searched(Sleb(1), loss_of=partial(summed_divergences, head, dense))
    small = narrowed_model(model, without([removal.block], 6))
    expected = divergence(model(IDS).logits, small(IDS).logits).double().sum() / 55
    assert removal.losses[removal.block] == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_that_is_not_finite_is_never_chosen_and_none_at_all_is_an_error():
    losses = iter([float("nan"), 3.0, float("inf"), 2.0])
    (removal,) = searched(Sleb(1), loss_of=lambda tried: torch.tensor([next(losses) for _ in tried]))
    assert removal.block == 4
    with pytest.raises(RunError, match=r"without any of the blocks \[1, 2, 3, 4\] the loss is not finite"):
        searched(Sleb(1), loss_of=lambda tried: torch.full((len(tried),), math.nan))


def test_of_equal_losses_the_earliest_block_goes():
    found = searched(Sleb(2), loss_of=lambda tried: torch.ones(len(tried)))
    assert [removal.block for removal in found] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"early_barrier": -1}, "must not be negative"),
        ({"loss": "mse"}, "must be one of kl, cross_entropy"),
        ({"blocks": None}, "give one of the two"),
    ],
)
def test_bad_settings_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        Sleb(**({"blocks": 1} | changes))


def test_more_blocks_than_are_free_are_a_problem():
    costs, dimensions = costs_of_model(parts()[0]), dimensions_of_model(parts()[0])
    assert Sleb(4).check(costs, dimensions) == []
    told = Sleb(5).check(costs, dimensions)[0]
    assert "would remove 5 blocks, and 4 of the 6 are not protected" in told
    assert "structure.early_barrier=1, structure.latter_barrier=1" in told
