"""Searches over the whole model: their gradients, the budget, what they promise, and the order of blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_llama import tiny_llama

from besa_exp.blocks.activations import allocator
from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.head import divergence, head_of
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.whole_model import Found, Weights, Whole
from besa_exp.errors import RunError
from besa_exp.methods.cuts import count_gradient
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.model_search import ModelRows, ModelSearch
from besa_exp.methods.pruners.model_tuning import ModelTuning, _Tuned
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.runs.block_loop import Decided
from besa_exp.tensors.importance import Wanda
from besa_exp.tensors.masks import Goal

INPUT_IDS = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(1))


def dense_model():
    return tiny_llama(context=32).requires_grad_(False)


def in_memory(needed):
    return lambda shape, dtype: torch.full(shape, torch.nan, dtype=dtype)


def whole_of(model, order=None, ids=INPUT_IDS, room=in_memory):
    blocks = capture_blocks(model, ids)
    inputs = embed(model, blocks, ids, 4)
    outputs = inputs.clone()
    for block in blocks:
        block.outputs(outputs, 4, out=outputs)

    def resident(backwards):
        for block in blocks[::-1] if backwards else blocks:
            if order is not None:
                order.append(block.index)
            yield block

    return Whole(resident, inputs, outputs, head_of(model, blocks, ids), 4, room)


def uniform(model, sparsity=0.5):
    """Keep masks of the right counts; which weights of a row they prune does not matter."""
    return [
        {
            name: (torch.arange(linear.weight.shape[1]) >= int(linear.weight.shape[1] * sparsity)).expand_as(
                linear.weight
            )
            for name, linear in block.linears.items()
        }
        for block in capture_blocks(model, INPUT_IDS)
    ]


def rows_of(model, sparsity=0.5):
    return ModelRows.of(whole_of(model), uniform(model, sparsity), Wanda())


@pytest.mark.parametrize("search", [ModelSearch(steps=5, batch_size=2, checks=5), ModelTuning(steps=5, checks=2)])
def test_a_search_says_how_many_samples_pass_the_blocks(search):
    """A sample that is learned from passes a block twice: forward, and once more on the way back."""
    model, seen = dense_model(), []
    whole, found = whole_of(model), [Found(lambda masks=masks: masks) for masks in uniform(model)]
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    down.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    search.refine(whole, found, lambda step: None)
    said = search.passes(len(INPUT_IDS))
    assert sum(seen) == said.plain + said.judged + 2 * said.learned


def test_the_divergence_is_that_of_the_model_with_the_masked_weights():
    model, pruned = dense_model(), dense_model()
    rows = rows_of(model)
    counts = rows.counts(rows.start)
    for number, block in enumerate(capture_blocks(pruned, INPUT_IDS)):
        for name, keep_mask in rows.rows[number].keep_masks(counts[number]).items():
            block.linears[name].weight.mul_(keep_mask)
    samples = torch.tensor([0, 3, 7])
    expected = divergence(model(INPUT_IDS[samples]).logits.double(), pruned(INPUT_IDS[samples]).logits.double()).mean()
    assert rows.divergence(rows.start, samples) == pytest.approx(float(expected), rel=1e-4)
    assert rows.gradient(rows.start, samples, 0.1)[0] == pytest.approx(float(expected), rel=1e-4)


def test_the_gradient_is_that_of_one_graph_through_the_whole_model():
    """d D / d count of a row is minus the mean over the window of W dL/dW (`count_gradient`), with dL/dW of a plain
    backward pass through all blocks at once."""
    model = dense_model()
    rows, samples = rows_of(model), torch.tensor([1, 2])
    found = rows.gradient(rows.start, samples, 0.1)[1]
    counts = rows.counts(rows.start)
    state = rows.whole.inputs[samples]
    masked, parts = [], []
    for number, block in enumerate(rows.whole.blocks(False)):
        own = {
            name: (block.linears[name].weight * mask).requires_grad_()
            for name, mask in rows.rows[number].keep_masks(counts[number]).items()
        }
        masked.append(own)
        state = block(state, own)
    divergence(rows.whole.head(rows.whole.outputs[samples]), rows.whole.head(state)).mean().backward()
    for number, block in enumerate(rows.whole.blocks(False)):
        own = replace(rows.rows[number], weights={name: block.linears[name].weight for name in masked[number]})
        by_count = {
            name: count_gradient(
                own.weights[name],
                weight.grad,
                own.ranks[name],
                counts[number][name],
                0.1 * weight.shape[1],
                weight.shape[1],
            )
            for name, weight in masked[number].items()
        }
        parts.append(own.columns * torch.cat([*by_count.values()]))
    plain = torch.cat(parts)
    expected = plain - rows.capacity * (plain.sum() / rows.capacity.sum())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert float(found.abs().max()) > 0


def test_blocks_are_visited_forwards_then_backwards_and_held_one_at_a_time():
    order: list[int] = []
    model = dense_model()
    rows = ModelRows.of(whole_of(model, order), uniform(model), Wanda())
    order.clear()
    rows.gradient(rows.start, torch.tensor([0]), 0.1)
    assert order == [0, 1, 1, 0]
    assert (
        len({id(buffer) for own in rows.room for buffer in own.masked.values()}) == 7
    )  # blocks of one shape share them


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_the_total_stays_exact_and_the_result_is_never_worse_on_the_probe(sparsity):
    model = dense_model()
    rows = rows_of(model, sparsity)
    steps = []
    counts = ModelSearch(steps=12, lr=0.05, checks=3).learn(rows, steps.append)
    assert sum(int(count.sum()) for own in counts for count in own.values()) == rows.total
    assert [step.step for step in steps] == list(range(12))
    probe = torch.tensor([11])
    learned = torch.cat([count for own in counts for count in own.values()]) / rows.capacity
    assert rows.divergence(learned, probe) <= rows.divergence(rows.start, probe)


def test_it_learns_and_depth_takes_part():
    rows, probe = rows_of(dense_model(), 0.3), torch.tensor([11])
    counts = ModelSearch(steps=12, lr=0.05, checks=3).learn(rows, lambda step: None)
    learned = torch.cat([count for own in counts for count in own.values()]) / rows.capacity
    assert rows.divergence(learned, probe) < 0.99 * rows.divergence(rows.start, probe)
    shares = [sum(int(count.sum()) for count in own.values()) for own in counts]
    assert shares[0] != shares[1]


def test_a_search_that_only_makes_it_worse_gives_back_its_start():
    rows = rows_of(dense_model())
    worse = replace(rows, whole=replace(rows.whole, outputs=-rows.whole.outputs))
    counts = ModelSearch(steps=2, lr=1.0, checks=1, window=1.0).learn(worse, lambda step: None)
    found = worse.divergence(torch.cat([c for own in counts for c in own.values()]) / rows.capacity, torch.tensor([11]))
    assert found <= worse.divergence(rows.start, torch.tensor([11]))


def test_its_ranks_are_those_that_besa_decided_by():
    pruned = dense_model()
    blocks = capture_blocks(pruned, INPUT_IDS)
    results = list(prune_blocks(blocks, embed(pruned, blocks, INPUT_IDS, 4), Besa(), Goal(0.5), 4))
    rows = ModelRows.of(whole_of(dense_model()), [result.keep_masks for _, result in results], Wanda())
    for number, (_, result) in enumerate(results):
        for name, keep_mask in rows.rows[number].keep_masks(rows.counts(rows.start)[number]).items():
            assert torch.equal(keep_mask, result.keep_masks[name]), name


def test_decided_masks_are_written_by_the_block_loop_with_the_course_of_the_search_before():
    model, pruned = dense_model(), dense_model()
    blocks = capture_blocks(pruned, INPUT_IDS)
    before = [report for report, _ in prune_blocks(blocks, embed(pruned, blocks, INPUT_IDS, 4), Besa(), Goal(0.5), 4)]
    rows = rows_of(model)
    masks = [rows.rows[number].keep_masks(counts) for number, counts in enumerate(rows.counts(rows.start))]
    decided = Decided(found_of(masks), before)
    blocks = capture_blocks(model, INPUT_IDS)
    for report, result in prune_blocks(blocks, embed(model, blocks, INPUT_IDS, 4), decided, Goal(0.5), 4):
        assert report.loss_before == before[report.index].loss_before
        assert report.steps == before[report.index].steps
        for name, keep_mask in result.keep_masks.items():
            assert torch.equal(blocks[report.index].linears[name].weight != 0, keep_mask)


def test_a_divergence_that_is_not_finite_stops_the_run():
    rows = rows_of(dense_model())
    rows.whole.outputs[0, 0, 0] = float("nan")
    with pytest.raises(RunError, match=r"divergence from the dense model is nan.*model\.dtype"):
        rows.gradient(rows.start, torch.tensor([0]), 0.1)


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("batch_size", 0), ("checks", 0), ("lr", 0.0), ("window", 2.0)]
)
def test_a_search_that_cannot_be_carried_out_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"pruner\.model\.{field}"):
        ModelSearch(**{field: value})


def test_scope_model_is_refused_where_rows_cannot_be_told_apart():
    assert "pruner.scope=model" in Besa(scope="model").check(0.5, "N:8")[0]
    assert "pruner.scope=model" in Besa(scope="model", granularity="linear").check(0.5, "unstructured")[0]
    assert not Besa(scope="model").check(0.5, "unstructured")
    assert Uniform().check(0.5, "unstructured") == []


def moved(found: Found) -> Weights:
    """The weights of a block whose kept weights moved."""
    assert found.weights is not None
    return found.weights()


def found_of(masks):
    return [Found(lambda own=own: own) for own in masks]


def uniform_masks(model):
    rows = rows_of(model, 0.3)
    return [rows.rows[number].keep_masks(counts) for number, counts in enumerate(rows.counts(rows.start))]


def test_a_step_of_tuning_moves_kept_weights_as_adam_does_with_the_gradient_of_one_graph():
    model = dense_model()
    whole, masks, samples = whole_of(model), uniform_masks(model), torch.tensor([1, 2])
    begun = [
        {name: 1.1 * block.linears[name].weight.detach() * mask for name, mask in own.items()}
        for block, own in zip(whole.blocks(False), masks, strict=True)
    ]
    leaves = [{name: weight.clone().requires_grad_() for name, weight in own.items()} for own in begun]
    state = whole.inputs[samples]
    for block, own in zip(whole.blocks(False), leaves, strict=True):
        state = block(state, own)
    divergence(whole.head(whole.outputs[samples]), whole.head(state)).mean().backward()
    found = zip(found_of(masks), begun, strict=True)
    state = _Tuned.of(whole, [replace(one, weights=lambda own=own: own) for one, own in found], 0.01)
    state.step(samples, 1.0)
    for number, (block, plain, kept) in enumerate(zip(whole.blocks(False), leaves, masks, strict=True)):
        for name, weight in state.weights(number, block).items():
            size = plain[name].detach()[kept[name]].square().mean().sqrt()
            change = (weight - plain[name].detach())[kept[name]] / (0.01 * size)
            gradient = plain[name].grad
            assert gradient is not None
            clear = gradient[kept[name]].abs() > 1e-3 * gradient.abs().max()
            torch.testing.assert_close(change[clear], -gradient[kept[name]].sign()[clear], rtol=1e-3, atol=1e-3)


def test_tuning_keeps_every_zero_and_is_better_on_the_probe():
    model = dense_model()
    whole = whole_of(model, ids=INPUT_IDS[:1].expand(4, -1))  # what judges is what is learned from
    masks, steps = uniform_masks(model), []
    found = ModelTuning(steps=24, lr=0.01).refine(whole, found_of(masks), steps.append)
    weights = [moved(one) for one in found]
    assert len(steps) == 24
    for number, own in enumerate(weights):
        assert found[number].keep_masks() is masks[number]
        for name, weight in own.items():
            assert not weight[~masks[number][name]].any()

    def dense(number, block):
        return {name: block.linears[name].weight * mask for name, mask in masks[number].items()}

    probe = whole.samples()[1]
    assert whole.divergence(probe, lambda number, block: weights[number]) < 0.8 * whole.divergence(probe, dense)


def test_the_first_of_five_steps_up_to_the_full_size_is_a_fifth_of_it():
    model = dense_model()
    whole, masks = whole_of(model, ids=INPUT_IDS[:1].expand(4, -1)), uniform_masks(model)
    found = ModelTuning(steps=1, lr=0.001).refine(whole, found_of(masks), lambda step: None)
    for block, one, own in zip(whole.blocks(False), found, masks, strict=True):
        for name, weight in moved(one).items():
            kept = block.linears[name].weight[own[name]]
            most = float((weight[own[name]] - kept).abs().max())
            assert most == pytest.approx(0.2 * 0.001 * float(kept.square().mean().sqrt()), rel=1e-2)


def test_tuning_holds_four_numbers_a_kept_weight_and_gives_the_same_where_they_lie_in_files(tmp_path):
    model = dense_model()
    masks = uniform_masks(model)
    kept = sum(int(mask.sum()) for own in masks for mask in own.values())
    needed, given = [], []

    def in_files(size):
        needed.append(size)
        _, allocate = allocator("disk", torch.device("cpu"), tmp_path, size)

        def room(shape, dtype):
            given.append(allocate(shape, dtype))
            return given[-1]

        return room

    def tuned(room):
        found = ModelTuning(steps=4, lr=0.1, checks=4).refine(
            whole_of(model, room=room), found_of(masks), lambda _: None
        )
        return [moved(one) for one in found]

    for own, expected in zip(tuned(in_files), tuned(in_memory), strict=True):
        assert all(torch.equal(own[name], weight) for name, weight in expected.items())
    assert needed == [16 * kept] == [sum(one.nbytes for one in given)] == [ModelTuning.bytes_held(2 * kept, 0.5)[1]]


def test_steps_of_tuning_that_did_not_help_are_undone_and_the_step_size_shrinks():
    model = dense_model()
    whole, masks = whole_of(model), uniform_masks(model)
    probe = whole.samples()[1]

    def divergence_after(checks):
        found = ModelTuning(steps=12, lr=0.1, checks=checks).refine(whole, found_of(masks), lambda step: None)
        return whole.divergence(probe, lambda number, block: moved(found[number]))

    start = whole.divergence(
        probe, lambda number, block: {name: block.linears[name].weight * mask for name, mask in masks[number].items()}
    )
    assert divergence_after(checks=1) == pytest.approx(start)
    assert divergence_after(checks=12) < 0.995 * start


def test_tuning_that_only_makes_it_worse_gives_back_its_start():
    model = dense_model()
    whole, masks = whole_of(model), uniform_masks(model)
    found = ModelTuning(steps=2, lr=1.0, checks=1).refine(whole, found_of(masks), lambda step: None)
    for own, block, kept in zip(found, whole.blocks(False), masks, strict=True):
        for name, weight in moved(own).items():
            assert torch.equal(weight, block.linears[name].weight * kept[name])
