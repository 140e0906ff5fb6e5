"""What all pruners promise (`pruner_cases.PRUNERS`)."""

from __future__ import annotations

import copy

import pytest
import torch
from host_waits import HostWaits
from near_ties import assert_allocations_agree
from pruner_cases import DENSE, INPUT_IDS, LEARNS, MOVES_WEIGHTS, PRUNERS, QUANTISED, measured, prune_tiny, weight_of
from transformers import AutoModelForCausalLM

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.loop import prune_blocks
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.besa_joint import BesaJoint
from besa_exp.methods.pruners.besa_paper import BesaPaper
from besa_exp.methods.pruners.candidates import CandidateAllocation
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.methods.tuning import Tuning
from besa_exp.methods.updates.barber import Barber
from besa_exp.methods.updates.dsnot import Dsnot
from besa_exp.methods.updates.obs import Obs
from besa_exp.methods.updates.reconstruct import Reconstruct
from besa_exp.methods.updates.updated import Updated
from besa_exp.tensors.masks import Goal
from besa_exp.tensors.quantisation import Quantiser, quantise
from besa_exp.texts.embedded.text import MODEL_DIR


@pytest.mark.parametrize("name", PRUNERS)
def test_zeros_are_where_the_keep_masks_say_and_counts_are_reported(name):
    model, results = prune_tiny(PRUNERS[name][0])
    assert len(results) == 2
    for report, pruned in results:
        for linear in report.linears:
            weight = weight_of(model, report, linear.name)
            keep_mask = pruned.keep_masks[linear.name]
            assert weight[~keep_mask].eq(0).all()
            assert linear.pruned == int((weight == 0).sum()) == int((~keep_mask).sum())
            assert linear.weights == weight.numel()


@pytest.mark.parametrize("name", PRUNERS)
def test_the_target_is_met(name):
    pruner, tolerance, _ = PRUNERS[name]
    sparsity = measured(prune_tiny(pruner)[1])
    assert abs(sparsity - 0.5) <= tolerance + 1e-9
    assert sparsity > 0 or name == "dense"


@pytest.mark.parametrize("name", PRUNERS)
def test_everything_but_the_linears_of_the_blocks_is_untouched(name):
    model, _ = prune_tiny(PRUNERS[name][0])
    dense = dict(DENSE.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        if "proj" not in parameter_name:
            assert torch.equal(parameter, dense[parameter_name]), parameter_name


@pytest.mark.parametrize("name", sorted(set(PRUNERS) - MOVES_WEIGHTS - {*QUANTISED}))
def test_kept_weights_of_mask_only_methods_are_the_dense_ones(name):
    model, results = prune_tiny(PRUNERS[name][0])
    for report, pruned in results:
        for linear, keep_mask in pruned.keep_masks.items():
            dense = weight_of(DENSE, report, linear)
            assert torch.equal(weight_of(model, report, linear), dense * keep_mask)


@pytest.mark.parametrize("name", PRUNERS)
def test_equal_runs_give_equal_bytes(name):
    first, second = prune_tiny(PRUNERS[name][0])[0], prune_tiny.__wrapped__(PRUNERS[name][0])[0]
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float16) for name in PRUNERS),
        *((name, torch.bfloat16) for name in ("wanda", "sparsegpt", "besa")),
    ],
)
def test_half_precision_weights_are_pruned_and_stay_finite(name, dtype):
    pruner, tolerance, _ = PRUNERS[name]
    model, results = prune_tiny(pruner, dtype=dtype)
    assert abs(measured(results) - 0.5) <= tolerance + 1e-9
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        *((name, "2:4") for name, row in PRUNERS.items() if row[2] and name != "dense"),
        *((name, pattern) for name in ("wanda", "sparsegpt", "besa_reconstruct") for pattern in ("4:8", "1:4")),
    ],
)
def test_n_of_m_holds_in_every_group_of_the_written_weights(name, pattern):
    kept, group = (int(number) for number in pattern.split(":"))
    model, results = prune_tiny(PRUNERS[name][0], pattern=pattern)
    for report, pruned in results:
        for linear in pruned.keep_masks:
            weight = weight_of(model, report, linear)
            left = (weight != 0).view(len(weight), -1, group).sum(-1)
            assert (left <= kept).all()
            assert name in QUANTISED or (left == kept).all()


@pytest.mark.parametrize("name", [name for name, row in PRUNERS.items() if not row[2]])
def test_a_learned_allocation_refuses_n_of_m_and_names_what_takes_it(name):
    (problem,) = PRUNERS[name][0].check(0.5, "2:4")
    assert "2:4" in problem
    assert "pruner=wanda" in problem


@pytest.mark.parametrize("pruner", [Uniform(), Uniform("ria"), *LEARNS])
@pytest.mark.parametrize("update", [Obs(), Dsnot()])
def test_what_an_update_observes_leaves_the_pruners_own_choice_as_it_was(pruner, update):
    """The norms come from another statistic, summed in another precision."""
    (_, alone), (_, updated) = prune_tiny(pruner)[1][0], prune_tiny(Updated(pruner, update))[1][0]
    assert_allocations_agree(updated.keep_masks, alone.keep_masks, 2e-3 if pruner in LEARNS else 0)


@pytest.mark.parametrize("update", [Obs(), Barber(), Reconstruct(Tuning(epochs=1))])
def test_each_step_of_a_search_is_reported_once_whatever_update_follows(update):
    (_, alone), (_, updated) = (prune_tiny(pruner)[1][1] for pruner in (Besa(), Updated(Besa(), update)))
    steps = [step.step for step in updated.steps]
    assert steps == [*range(len(steps))]
    assert (len(steps) > len(alone.steps)) == isinstance(update, Reconstruct)


@pytest.mark.parametrize("granularity", ["row", "linear"])
@pytest.mark.parametrize("sparsity", [0.05, 0.35, 0.7, 0.95])
def test_besa_reaches_any_target_and_keeps_the_budget_at_every_step(granularity, sparsity):
    _, results = prune_tiny(Besa(granularity=granularity, checks=2, lr=0.5), sparsity)
    assert abs(measured(results) - sparsity) < 0.0005
    for report, _ in results:
        assert all(abs(step.expected_sparsity - sparsity) < 0.0005 for step in report.steps)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_row_holds_no_more_values_than_its_bits_allow_zero_among_them(name):
    model, results = prune_tiny(PRUNERS[name][0])
    for report, pruned in results:
        for linear in pruned.keep_masks:
            assert max(len(row.unique()) for row in weight_of(model, report, linear)) <= 16


@pytest.mark.parametrize(("bits", "group_size"), [(2, None), (3, 16), (8, 40)])
def test_joint_compression_takes_any_bits_and_groups_at_the_exact_budget(bits, group_size):
    quantiser = Quantiser(bits, group_size)
    for first, (report, pruned) in zip((True, False), prune_tiny(BesaJoint(Besa(epochs=3), quantiser))[1], strict=True):
        weights = sum(linear.weights for linear in report.linears)
        asked = sum(float((pruned.allocated[name] * mask.shape[1]).sum()) for name, mask in pruned.keep_masks.items())
        assert round(asked) == round(weights / 2)
        assert sum(linear.pruned for linear in report.linears) >= weights / 2
        assert report.loss_after <= report.loss_before + 1e-7
        assert not first or report.loss_after < report.loss_before
        assert pruned.weights is not None
        for weight in pruned.weights.values():
            assert all(len(g.unique()) <= 2**bits for row in weight for g in row.split(group_size or len(row)))


@pytest.mark.parametrize("name", QUANTISED)
def test_an_update_cannot_move_weights_that_were_rounded(name):
    problems = Updated(PRUNERS[name][0], Obs()).check(0.5, "unstructured")
    assert "update=obs: moves the weights that the pruner rounds; leave the update out" in problems


def test_joint_compression_learns_the_clipping_with_the_sparsities():
    block, pruned = prune_tiny(BesaJoint(quantiser=Quantiser(3)))[1][0]
    at_start = quantise(weight_of(DENSE, block, "mlp.down_proj"), Quantiser(3))
    assert pruned.weights is not None
    assert not torch.equal(pruned.weights["mlp.down_proj"], at_start)
    assert pruned.allocated["mlp.down_proj"].std() > 0


def test_with_enough_bits_joint_compression_starts_where_plain_besa_does():
    plain, joint = (prune_tiny(pruner)[1][0][0] for pruner in (Besa(), BesaJoint(quantiser=Quantiser(8))))
    assert joint.loss_before == pytest.approx(plain.loss_before, rel=0.02)


def test_quantising_first_prunes_rounded_weights_and_quantising_last_rounds_what_is_kept():
    dense = weight_of(DENSE, prune_tiny(Uniform())[1][0][0], "self_attn.q_proj")
    mask = prune_tiny(Uniform())[1][0][1].keep_masks["self_attn.q_proj"]
    last = prune_tiny(PRUNERS["wanda_then_quantise"][0])[1][0][1].weights or {}
    first = prune_tiny(PRUNERS["quantise_then_wanda"][0])[1][0][1].weights or {}
    assert torch.equal(last["self_attn.q_proj"], quantise(dense * mask, Quantiser()))
    assert torch.equal(first["self_attn.q_proj"], quantise(dense, Quantiser()))


def test_besa_allocates_unlike_uniform_and_never_ends_above_its_start_on_the_probe():
    for report, pruned in prune_tiny(Besa())[1]:
        assert report.loss_after <= report.loss_before
        assert pruned.allocated["mlp.down_proj"].std() > 0


@pytest.mark.parametrize(("granularity", "sparsity"), [("row", 0.37), ("row", 0.8), ("linear", 0.5)])
def test_with_n_of_8_every_group_of_a_row_keeps_the_rows_own_n_and_the_budget_is_met(granularity, sparsity):
    results = prune_tiny(Besa(granularity=granularity, epochs=3), sparsity, "N:8")[1]
    for report, pruned in results:
        chosen = set()
        for linear, keep_mask in pruned.keep_masks.items():
            kept = keep_mask.view(len(keep_mask), -1, 8).sum(-1)
            assert torch.equal(kept, kept[:, :1].expand_as(kept)), linear
            assert torch.equal(1 - kept[:, 0] / 8, pruned.allocated[linear].float())
            chosen |= set(kept[:, 0].tolist())
        assert len(chosen) > 1 or granularity == "linear"
        weights, zeros = (sum(getattr(linear, key) for linear in report.linears) for key in ("weights", "pruned"))
        assert abs(zeros - sparsity * weights) <= 2.5  # levels are worth 64 / 8 and 96 / 8 weights: steps of 4


def test_with_n_of_8_besa_begins_at_uniform_wanda_and_never_ends_above_it_on_the_probe():
    (first, _), *_ = results = prune_tiny(Besa(), 0.5, "N:8")[1]
    (uniform, _), *_ = prune_tiny(Uniform(), pattern="4:8")[1]
    assert first.loss_before == uniform.loss_after
    assert first.loss_after < first.loss_before
    assert all(report.loss_after <= report.loss_before for report, _ in results)


def test_a_block_is_reported_in_the_reconstruction_loss_whichever_loss_besa_learns_from():
    (first, _), *_ = prune_tiny(Besa(loss="channel"))[1]
    (uniform, _), *_ = prune_tiny(Uniform())[1]
    assert first.loss_before == uniform.loss_after


def test_on_the_embedded_model_rows_that_choose_n_of_8_lose_less_than_4_of_8_everywhere():
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR).requires_grad_(False)
    input_ids = torch.randint(0, 1000, (17, 32), generator=torch.Generator().manual_seed(2))
    losses = []
    for pruner, pattern in ((Uniform(), "4:8"), (Besa(), "N:8")):
        blocks = capture_blocks(one := copy.deepcopy(model), input_ids)
        inputs = embed(one, blocks, input_ids, 17)
        results = list(prune_blocks(blocks[:2], inputs, pruner, Goal.parse(0.5, pattern), 17))
        assert measured(results) == 0.5
        losses.append([report.loss_after for report, _ in results])
    assert all(chosen < 0.9 * uniform for uniform, chosen in zip(*losses, strict=True))


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "besa_paper"])
def test_an_n_that_rows_choose_is_refused_by_methods_that_do_not_choose(name):
    (problem,) = PRUNERS[name][0].check(0.5, "N:8")
    assert "pattern=N:8" in problem
    assert "pruner=besa" in problem


def test_besa_linear_shares_one_sparsity_per_linear():
    for _, pruned in prune_tiny(Besa(granularity="linear", lr=0.2))[1]:
        for name, mask in pruned.keep_masks.items():
            counts = (~mask).sum(dim=1)
            assert counts.max() - counts.min() <= 1, name


def test_a_block_of_which_a_budget_asks_nothing_stays_dense_under_besa_paper():
    """Its penalty divides by the target."""
    model = copy.deepcopy(DENSE)
    blocks = capture_blocks(model, INPUT_IDS)
    goals = [Goal(0.0, exact=True), Goal(0.5, exact=True)]
    first, second = (r for r, _ in prune_blocks(blocks, embed(model, blocks, INPUT_IDS, 4), BesaPaper(), goals, 4))
    assert (first.sparsity, first.steps) == (0, ())
    assert 0.4 < second.sparsity < 0.6


def test_besa_paper_cannot_leave_its_published_range():
    results = prune_tiny(BesaPaper(d_coef=1000.0, penalty=1000.0), sparsity=0.9)[1]
    for _, pruned in results:
        for allocated in pruned.allocated.values():
            assert float(allocated.min()) > 0.37
            assert float(allocated.max()) < 0.63


def test_candidates_are_read_before_they_go_to_the_device():
    """Each that is read there waits for the GPU: 101 a linear."""
    with HostWaits() as waits:
        CandidateAllocation(torch.randn(2, 8), torch.rand(2, 8), True, True, 0.01)
    assert waits.reads == ["tolist"]


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Besa(granularity="column"), "pruner.granularity=column"),
        (lambda: Besa(lr=0.0), "pruner.lr=0: must be above 0"),
        (lambda: Besa(epochs=0), "pruner.epochs=0"),
        (lambda: BesaPaper(metric="wanda"), "pruner.metric=wanda"),
        (lambda: BesaPaper(d_coef=0.0), "pruner.d_coef=0: must be above 0"),
        (lambda: BesaPaper(d_coef=1e30), "be above 0 and at most 1000000.0"),  # beyond what fp32 holds
        (lambda: BesaPaper(sparsity_step=1e-9), r"pruner.sparsity_step=1e-09: must be in \[0.0001, 0.5\]"),
        (lambda: SparseGPT(damping=0.0), "pruner.damping=0: must be above 0"),
        (lambda: SparseGPT(group_size=0), "pruner.group_size=0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_key_and_value(make, field):
    with pytest.raises(ValueError, match=field):
        make()
