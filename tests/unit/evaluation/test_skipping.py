"""Policies: one pass is token by token, rows and paddings do not matter, cold and warm ones never skip."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXTURES, SIZES, tiny
from tiny_llama import middle_of_model, tiny_llama
from transformers import AutoModelForCausalLM, SmolLM3Config
from watched_policy import watched

from besa_exp.errors import RunError
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.evaluation.prompt_skipping import passing_prompts, prefill_skipping
from besa_exp.evaluation.skipping import skipping
from besa_exp.evaluation.skipping_rules import FfnSkipping, RandomSkipping, StaticSkipping, threshold_for

IDS = torch.randint(3, 200, (3, 14), generator=torch.Generator().manual_seed(9))
GREEDY = FfnSkipping(0.0, span=2, cold_first=1, cold_last=1, warm_tokens=2)
POLICIES = [GREEDY, FfnSkipping(0.3, None, 0, 0, 0), StaticSkipping((1, 3)), RandomSkipping(0.4, seed=1, warm_tokens=1)]


@cache
def model_of(blocks=5) -> tuple[Any, str]:
    model = tiny_llama(num_hidden_layers=blocks, seed=4)
    return model.requires_grad_(False), middle_of_model(model, IDS)


def logits_under(policy, ids=IDS, prompt=4, **arguments):
    model, middle = model_of()
    with skipping(model, policy, middle, prompt) as course:
        return model(ids, use_cache=False, **arguments).logits, course


def ran_under(policy):
    """Which tokens ran each block's FFN in one pass, [block sample seq]."""
    told, decided = watched(policy)
    logits_under(told)
    return torch.stack([block.ran for block in decided])


@pytest.mark.parametrize("policy", POLICIES)
def test_one_pass_is_token_by_token(policy):
    model, middle = model_of()
    expected, course = logits_under(policy)
    assert 0 < course.fraction < 1
    told, decided = watched(policy)
    with skipping(model, told, middle) as stepwise:
        found = model(IDS[:, :4], use_cache=True)
        logits, held = [found.logits], found.past_key_values
        for place in range(4, IDS.shape[1]):
            found = model(IDS[:, place : place + 1], past_key_values=held, use_cache=True)
            logits.append(found.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)
    ran = torch.stack([torch.cat([block.ran for block in decided[place::5]], 1) for place in range(5)])
    assert torch.equal(ran, ran_under(policy)[:, :, 4:])
    assert stepwise.fraction == course.fraction
    assert not torch.allclose(expected, model(IDS).logits, atol=1e-3)


def test_a_policy_that_never_skips_is_the_dense_model_to_the_last_bit():
    model, _ = model_of()
    found, course = logits_under(FfnSkipping(2.0, cold_first=0, cold_last=0))
    assert torch.equal(found, model(IDS, use_cache=False).logits)
    assert (course.skipped, course.counted) == (0, 3 * 10 * 5)


def test_cold_blocks_warm_tokens_and_the_prompt_never_skip():
    ran = ran_under(FfnSkipping(-1.0, None, 1, 2, 3))
    assert bool(ran[0].all())
    assert bool(ran[3:].all())
    assert bool(ran[:, :, : 4 + 3].all())
    assert not bool(ran[2, :, 7:].any())
    for policy in (StaticSkipping((0,), warm_tokens=3), RandomSkipping(1.0, warm_tokens=3)):
        ran = ran_under(policy)[0]
        assert bool(ran[:, :7].all())
        assert not bool(ran[:, 7:].any())


def test_rows_do_not_influence_each_other_and_left_padding_changes_nothing():
    expected, course = logits_under(GREEDY)
    for row in range(3):
        torch.testing.assert_close(
            logits_under(GREEDY, IDS[row : row + 1])[0], expected[row : row + 1], rtol=1e-4, atol=1e-4
        )
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), IDS], 1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found, other = logits_under(GREEDY, padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(found[:, 2:], expected, rtol=1e-4, atol=1e-4)
    assert (other.skipped, other.counted) == (course.skipped, course.counted)


def test_sequences_of_unlike_prompts_decode_together_as_each_does_by_itself():
    """Paddings on the left are no tokens of the prompt: what is decoded begins at one place."""
    model, middle = model_of()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1, :4]], 1)
    with skipping(model, GREEDY, middle) as alone:
        short, long = (model.generate(ids, **settings) for ids in (IDS[:1, :4], IDS[1:2, :7]))
    both = torch.cat([padded, IDS[1:2, :7]])
    with skipping(model, GREEDY, middle) as together:
        found = model.generate(both, attention_mask=(both != 0).long(), **settings)
    assert found[:, 7:].tolist() == [short[0, 4:].tolist(), long[0, 7:].tolist()]
    assert (together.skipped, together.counted) == (alone.skipped, alone.counted)
    assert alone.skipped > 0


def test_a_skipped_ffn_is_not_computed_where_all_tokens_skip_it():
    model, middle = model_of()
    calls = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, n=n: calls.append(n)) for n, layer in enumerate(model.model.layers)
    ]
    with skipping(model, StaticSkipping((1, 3)), middle):
        model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=-1)
    for hook in hooks:
        hook.remove()
    assert calls == [0, 1, 2, 3, 4, 0, 2, 4, 0, 2, 4]


def test_a_higher_threshold_never_skips_more_after_the_first_block_that_may():
    policies = [FfnSkipping(threshold, 1, 0, 0) for threshold in (-1.0, 0.0, 0.2, 0.4, 0.8, 1.0)]
    fractions = [int((~ran_under(policy)[1]).sum()) for policy in policies]
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[0] > fractions[-1]


def test_perplexity_under_a_policy_is_that_of_its_logits():
    model, middle = model_of()
    with skipping(model, GREEDY, middle, 0):
        found = perplexity(model, IDS, 14, 2).value
    logits, _ = logits_under(GREEDY, prompt=0)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).exp()
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert found != pytest.approx(perplexity(model, IDS, 14, 2).value, rel=1e-3)


def test_the_threshold_for_a_fraction_is_found_by_bisection():
    threshold, fraction = threshold_for(0.3, lambda bound: max(0.0, 0.5 - bound))
    assert threshold == pytest.approx(0.2, abs=1e-3)
    assert fraction == pytest.approx(0.3, abs=1e-3)
    threshold, fraction = threshold_for(0.25, lambda bound: logits_under(FfnSkipping(bound, 1, 0, 0))[1].fraction)
    assert abs(fraction - 0.25) < 0.08
    assert logits_under(FfnSkipping(threshold, 1, 0, 0))[1].fraction == fraction


def test_random_skipping_skips_its_fraction():
    numbers = torch.arange(4000).view(4, 1000)
    for block in range(3):
        drawn = RandomSkipping(0.3, seed=block).skips(block, 3, numbers, numbers).float().mean()
        assert float(drawn) == pytest.approx(0.3, abs=0.03)
    one, block, seed = (RandomSkipping(0.3, s).skips(b, 3, numbers, numbers) for s, b in ((0, 0), (0, 1), (1, 0)))
    for other in (block, seed):  # draws of their own
        assert float((one & other).float().mean()) == pytest.approx(0.09, abs=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_whose_ffn_comes_after_attention_can_skip_and_others_are_refused(family):
    model = tiny(family)
    ids = IDS % 60
    if family in ("gpt_neox", "falcon"):
        with pytest.raises(RunError, match="has no state between attention and FFN"):
            middle_of_model(model, ids)
        return
    middle = middle_of_model(model, ids)
    dense = model(ids, use_cache=False).logits
    with skipping(model, StaticSkipping((0, 1)), middle, 0) as course:
        found = model(ids, use_cache=False).logits
        model.generate(ids[:1], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert not torch.allclose(found, dense, atol=1e-4)
    assert torch.equal(model(ids, use_cache=False).logits, dense)
    assert course.fraction == 1.0


def test_a_prompt_of_two_tokens_passes_a_block_by():
    model, ids = tiny("llama"), IDS[:2, :2] % 60 + 3
    with passing_prompts(model, (1,), 2):
        expected = model(ids, use_cache=False).logits
    with torch.no_grad(), prefill_skipping(model, (1,)) as course:
        torch.testing.assert_close(model(ids, use_cache=True).logits, expected, rtol=1e-4, atol=1e-5)
    assert (course.skipped, course.counted) == (4, 8)


OTHER_KEYS = {"phi3", "olmo2", "stablelm", "gpt_neox", "opt", "opt_350m", "bloom", "falcon", "gpt2", "olmoe"}


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES, "smollm3"])
def test_prompts_pass_a_block_of_every_family_as_in_one_pass_or_are_refused(family):
    if family == "smollm3":  # its last block does not rotate its keys
        settings: dict[str, Any] = SIZES | {"no_rope_layers": [1, 0], "pad_token_id": 0}
        model: Any = AutoModelForCausalLM.from_config(SmolLM3Config(**settings)).eval().requires_grad_(False)
    else:
        model = tiny(family)
    ids = IDS[:2, :9] % 60 + 3
    with passing_prompts(model, (1,), 6):
        expected = model(ids, use_cache=False).logits
    refused = family in OTHER_KEYS | {"smollm3"}
    told = pytest.raises(RunError, match="makes its keys is not known here") if refused else nullcontext()
    with torch.no_grad(), told, prefill_skipping(model, (1,)):
        found = model(ids[:, :6], use_cache=True)
        held, tokens = found.past_key_values, ids[:, 6:].split(1, dim=1)
        logits = [found.logits, *(model(one, past_key_values=held, use_cache=True).logits for one in tokens)]
        torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-5)
