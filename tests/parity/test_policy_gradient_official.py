"""Policy gradient against its authors' code, from the recorded draws and losses; Wanda-sp's importances and masks."""

from __future__ import annotations

import pytest
import torch
from neighbours import all_masked, recorded, recorded_model, recorded_tokens, test_nll, unpacked

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.checkpoints.narrowed_model import dimensions_of_model, narrowed_model
from besa_exp.checkpoints.structure import Structure
from besa_exp.methods.descent import falling
from besa_exp.methods.structure.estimators import (
    moving_baseline,
    policy_gradient,
    projected,
    sigmap,
    starting_scores,
)
from besa_exp.methods.structure.widths import Importances, importances_of

CASES = ("published_recipe", "large_steps", "random_start_by_layer", "no_baseline")
AUTHORS = {"halvings": 21, "tolerance": 1e-3}


@pytest.fixture(scope="module")
def run(shared_dir):
    return recorded(shared_dir, "policy_gradient")


def masks_of(uniforms, scores):
    """Heads of all blocks, then channels, from draws that come block by block."""
    heads, channels = uniforms[..., :4].flatten(1), uniforms[..., 4:].flatten(1)
    return torch.cat([heads, channels], dim=1) < scores.float()


@pytest.mark.parametrize("case", CASES)
def test_updates_and_projections_are_the_authors(run, case):
    told, tensors = run
    settings = told["cases"][case]
    start = Importances(tensors[f"{case}.initial_scores_heads"], tensors[f"{case}.initial_scores_channels"])
    scores, baseline = start.flat.double(), None
    for number, step in enumerate(settings["steps"]):
        losses = torch.tensor(step["losses"], dtype=torch.float64)
        mean = float(losses.mean())
        baseline = moving_baseline(baseline, mean, settings["window"])
        delta = 0.0 if settings["cancel_ma_baseline"] else baseline
        if not settings["cancel_ma_baseline"]:
            assert baseline == pytest.approx(step["baseline_after"], rel=1e-6)
        rate = settings["lr"] * falling(number, settings["total_iters"])
        assert rate == pytest.approx(step["lr"], rel=1e-6)
        masks = masks_of(tensors[f"{case}.uniforms"][number], scores)
        updated = scores - rate * policy_gradient(losses, masks, scores, delta)
        expected = tensors[f"{case}.scores_after_update"][number]
        torch.testing.assert_close(updated.float(), expected, rtol=0, atol=1e-6)
        found = project(updated, settings)
        expected = tensors[f"{case}.scores_after_projection"][number]
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-6)
        scores = expected.double()
    heads, channels = scores[:16], scores[16:]
    for name, values, shape in (("heads", heads, (4, 4)), ("channels", channels, (4, 172))):
        final = unpacked_or_whole(tensors[f"{case}.final_keep_{name}"], shape)
        parts = [values] if settings["global_hard_mask"] else values.view(4, -1)
        kept = torch.cat([keep_most_important(part.float(), settings["keep"]) for part in parts])
        assert torch.equal(kept.view(shape), final)


def keep_most_important(importance, keep):
    """The authors' mask."""
    return importance >= importance.sort().values[int((1 - keep) * len(importance))]


def unpacked_or_whole(mask, shape):
    return mask.bool() if tuple(mask.shape) == tuple(shape) else unpacked(mask, shape)


def project(scores, settings):
    """Heads and channels each with a budget of their own, over all blocks or in each."""
    parts = [scores[:16], scores[16:]]
    if not settings["global_hard_mask"]:
        parts = [block for part in parts for block in part.view(4, -1)]
    return torch.cat(
        [projected(part, settings["keep"] * len(part), torch.ones_like(part), **AUTHORS) for part in parts]
    )


def test_projections_of_given_scores_are_the_authors(run):
    told, tensors = run
    before = tensors["projection.before"]
    flat = torch.cat([before[:, :8].flatten(), before[:, 8:].flatten()])
    for result in told["projection"]["results"]:
        keep, expected = result["keep"], tensors[f"projection.after_{result['keep']}"]
        heads, channels = (
            projected(part, keep * len(part), torch.ones_like(part), **AUTHORS) for part in (flat[:16], flat[16:])
        )
        for name, before_it, after in (("v_heads", flat[:16], heads), ("v_channels", flat[16:], channels)):
            moved = (before_it - after)[(after > 0) & (after < 1)]
            torch.testing.assert_close(moved, torch.full_like(moved, result[name]), rtol=0, atol=1e-6)
        found = torch.cat([heads.view(2, 8), channels.view(2, 32)], dim=1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_sigmap_is_the_authors(run):
    told = run[0]["sigmap"]
    found = sigmap(torch.tensor(told["input"]), told["target"])
    assert found.tolist() == pytest.approx(told["output"], abs=1e-6)


def test_wanda_sps_importances_masks_and_starting_scores_are_the_authors(run, shared_dir):
    told, tensors = run
    model = recorded_model(shared_dir)
    ids, _ = recorded_tokens(shared_dir)
    dimensions = dimensions_of_model(model)
    blocks = capture_blocks(model, ids)
    keep = told["cases"]["published_recipe"]["keep"]
    kept = (4 - int((1 - keep) * 4), 172 - int((1 - keep) * 172))
    found = importances_of(blocks, embed(model, blocks, ids, 16), dimensions, kept, 16)
    torch.testing.assert_close(found.groups, tensors["published_recipe.metric_heads"], rtol=5e-6, atol=0)
    torch.testing.assert_close(found.channels, tensors["published_recipe.metric_channels"], rtol=5e-6, atol=0)
    scores = starting_scores(found, keep)
    torch.testing.assert_close(scores.groups, tensors["published_recipe.initial_scores_heads"], rtol=0, atol=2e-6)
    torch.testing.assert_close(scores.channels, tensors["published_recipe.initial_scores_channels"], rtol=0, atol=2e-6)
    for name, rows in (("heads", found.groups), ("channels", found.channels)):
        masks = torch.stack([keep_most_important(row, keep) for row in rows])
        assert torch.equal(masks, unpacked_or_whole(tensors[f"published_recipe.initial_keep_{name}"], masks.shape))


@pytest.mark.parametrize("case", CASES)
def test_recorded_losses_scores_and_sizes_follow_from_the_masks(run, shared_dir, case):
    told, tensors = run
    settings = told["cases"][case]
    model = recorded_model(shared_dir)
    ids, test_ids = recorded_tokens(shared_dir)
    dimensions, blocks = dimensions_of_model(model), capture_blocks(model, ids)
    scores = torch.cat([tensors[f"{case}.initial_scores_{name}"].flatten() for name in ("heads", "channels")])
    step = settings["steps"][0]
    for mask, loss in zip(masks_of(tensors[f"{case}.uniforms"][0], scores), step["losses"], strict=True):
        with all_masked(blocks, mask[:16].view(4, 4), mask[16:].view(4, 172), dimensions):
            assert test_nll(model, ids[slice(*step["samples"])]) == pytest.approx(loss, rel=2e-6)
    groups = unpacked_or_whole(tensors[f"{case}.final_keep_heads"], (4, 4))
    channels = unpacked_or_whole(tensors[f"{case}.final_keep_channels"], (4, 172))
    kept = [tuple(tuple(row.nonzero()[:, 0].tolist()) for row in mask) for mask in (groups, channels)]
    structure = Structure((0, 1, 2, 3), *kept)
    small = narrowed_model(model, structure, uneven=True)
    assert (model.num_parameters(), small.num_parameters()) == tuple(settings["parameters"])
    assert test_nll(small, test_ids) == pytest.approx(settings["test_nll_hard_mask"], abs=2e-6)
