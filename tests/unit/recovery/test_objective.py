"""What a tuned model is judged by, against formulas in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from pruned_llama import EXAMPLES, LENGTHS, OWN, WINDOWS, pruned_llama

from besa_exp.recovery.descent import Adam
from besa_exp.recovery.full import Full
from besa_exp.recovery.objective import (
    Distillation,
    NextToken,
    answer_losses,
    called,
    mean_loss,
    num_tokens,
    option_errors,
    option_losses,
    option_scores,
    square_head,
)


def value(objective, windows):
    model = objective.model.requires_grad_(True)
    loss, _ = objective.differentiate(windows)
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    return loss, gradient


def log_q(model, windows):
    return model(windows, use_cache=False).logits.detach().double().log_softmax(dim=-1)


def test_the_loss_is_the_mean_over_all_tokens_but_the_first_of_each_window():
    model, _ = pruned_llama()
    expected = -log_q(model, WINDOWS[:4])[:, :-1].gather(2, WINDOWS[:4, 1:, None]).mean()
    for micro_batch in (1, 3, 4):
        assert value(NextToken(model, micro_batch=micro_batch), WINDOWS[:4])[0] == pytest.approx(float(expected))
    assert mean_loss(model, WINDOWS[:4], 3) == pytest.approx(float(expected))


def test_distilled_logits_are_a_divergence_at_the_temperature_times_its_square():
    (model, _), (teacher, _) = pruned_llama(), pruned_llama(pruned=0)
    told = Distillation("logits", distill_weight=0.7, task_weight=0.2, temperature=2.0)
    with torch.no_grad():
        p = (teacher(WINDOWS[:4]).logits.double() / 2).log_softmax(dim=-1)
        q = (model(WINDOWS[:4]).logits.double() / 2).log_softmax(dim=-1)
        task = -log_q(model, WINDOWS[:4])[:, :-1].gather(2, WINDOWS[:4, 1:, None]).mean()
    expected = 0.2 * task + 0.7 * 4 * (p.exp() * (p - q)).sum(-1).mean()
    for micro_batch in (1, 4):
        found, _ = value(NextToken(model, told, teacher, micro_batch), WINDOWS[:4])
        assert found == pytest.approx(float(expected), rel=1e-5)


def test_squarehead_is_the_sum_over_blocks_of_a_ratio_of_each_window_of_states_after_the_block():
    """A sum over blocks, not a mean, in the authors' code: a weight of 1 weighs each block as much as the task."""
    (model, _), (teacher, _) = pruned_llama(), pruned_llama(pruned=0)
    with torch.no_grad():
        states, dense = (m(WINDOWS[:4], output_hidden_states=True).hidden_states for m in (model, teacher))
    assert len(states) == 3
    ratios = [
        (d.double() - h.double()).square().sum((1, 2)) / d.double().square().sum((1, 2))
        for h, d in zip(states[1:], dense[1:], strict=True)
    ]
    expected = torch.stack(ratios).sum(0).mean()
    told = Distillation("squarehead", task_weight=0.0)
    whole, gradient = value(NextToken(model, told, teacher, 4), WINDOWS[:4])
    assert whole == pytest.approx(float(expected), rel=1e-5)
    assert square_head(torch.full((1, 2, 3), 1e-6), torch.zeros(1, 2, 3)).tolist() == [1.0]
    parts, of_parts = value(NextToken(model, told, teacher, 1), WINDOWS[:4])
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(of_parts, gradient, rtol=1e-4, atol=1e-6)


def test_squarehead_is_followed_through_checkpointed_blocks_too_which_are_computed_twice():
    losses, passes = [], []
    for checkpointing in (False, True):
        (model, keep), (teacher, _) = pruned_llama(), pruned_llama(pruned=0)
        for layer in model.model.layers:
            layer.get_submodule("mlp").register_forward_pre_hook(lambda *_, twice=checkpointing: passes.append(twice))
        objective = NextToken(model, Distillation("squarehead"), teacher, 2, checkpointing)
        tuner = Full(Adam(lr=1e-2)).begin(model, keep, 0)
        losses.append([tuner.step(objective, WINDOWS[:2], number, 1.0) for number in range(3)])
    assert (passes.count(False), passes.count(True)) == (3 * 2, 2 * 3 * 2)
    for plain, other in zip(*losses, strict=True):
        assert other.loss == pytest.approx(plain.loss, rel=1e-5)
        assert other.gradient_norm == pytest.approx(plain.gradient_norm, rel=1e-4)


def test_tokens_are_those_of_windows_or_of_options_without_what_fills_them_up():
    assert num_tokens(WINDOWS[:4]) == WINDOWS[:4].numel()
    assert num_tokens(EXAMPLES) == sum(map(sum, LENGTHS)) < EXAMPLES.numel()


def test_options_are_told_apart_by_the_mean_log_probability_of_their_own_tokens():
    """Against each option alone, without what fills it up."""
    model, _ = pruned_llama()
    scores = torch.zeros(3, 2)
    for example, option in itertools.product(range(3), range(2)):
        row = EXAMPLES[example, option][: LENGTHS[example][option]]
        own = OWN[example][option]
        ids = torch.cat([row[:-own], ~row[-own:]])[None]
        scores[example, option] = log_q(model, ids)[0, :-1].gather(1, ids[0, 1:, None])[-own:].mean()
    logits, _ = called(model, EXAMPLES, False)
    assert logits.shape[:2] == (6, 20)
    torch.testing.assert_close(option_scores(logits, EXAMPLES), scores, rtol=1e-5, atol=1e-6)
    expected = torch.logsumexp(scores, dim=1) - scores[:, 0]
    torch.testing.assert_close(option_losses(logits, EXAMPLES), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(answer_losses(logits, EXAMPLES), -scores[:, 0], rtol=1e-5, atol=1e-6)
    assert option_errors(logits, EXAMPLES).tolist() == [float(right <= wrong) for right, wrong in scores.tolist()]
    assert mean_loss(model, EXAMPLES, 2, option_losses) == pytest.approx(float(expected.mean()), rel=1e-5)
    same = EXAMPLES[:1].clone()
    same[:, 1] = same[:, 0]
    assert option_errors(called(model, same, False)[0], same).tolist() == [1]  # nothing says which
    assert option_errors(torch.full_like(logits, torch.nan), EXAMPLES).tolist() == [1] * 3


def test_faults_are_told():
    model, _ = pruned_llama()
    with pytest.raises(ValueError, match=r"recovery\.distill=none"):
        NextToken(model, teacher=model)
    with pytest.raises(ValueError, match=r"recovery\.distill=logit:"):
        Distillation("logit")
    with pytest.raises(ValueError, match="use logits"):
        NextToken(model, Distillation("squarehead"), model).of_logits(torch.zeros(1, 4, 8), WINDOWS[:1, :4])
