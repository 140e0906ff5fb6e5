"""FFN skipping against a literal run in fp64, decoding and in one pass; ShortGPT-gen against its authors' code."""

from __future__ import annotations

import pytest
import torch
from neighbours import recorded, recorded_model, recorded_tokens
from tiny_llama import middle_of_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from watched_policy import watched

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.evaluation.prompt_skipping import prefill_skipping
from besa_exp.evaluation.skipping import pass_under, skipping
from besa_exp.evaluation.skipping_rules import FfnSkipping, decoded_numbers

KEYS = ("threshold", "span", "cold_first", "cold_last", "warm_tokens")
CASES = ("never", "warm_4_tau_low", "cold_1_0", "always_after_first")


@pytest.fixture(scope="module")
def run(shared_dir):
    told, tensors = recorded(shared_dir, "ffn_skip_formula")
    return told, tensors, recorded_model(shared_dir).double(), *recorded_tokens(shared_dir)


def test_similarities_of_the_dense_model_are_the_recorded_ones(run):
    told, tensors, model, ids, _ = run
    blocks = capture_blocks(model, ids)
    passed = pass_under(
        blocks, 4, "post_attention_layernorm", embed(model, blocks, ids, 16), FfnSkipping(2.0, None, 0, 0),
        decoded_numbers(ids.shape, 0), 5,
    )  # fmt: skip
    found = torch.stack([similarity for _, similarity in passed])
    torch.testing.assert_close(found.float(), tensors["similarity"], rtol=0, atol=2e-7)
    assert found.mean(dim=(1, 2)).tolist() == pytest.approx(told["mean_similarity_per_block"], abs=1e-7)


def check_course(case, ran, similarities):
    assert [[int(one) for one in token] for token in ran] == case["ffn_ran"]
    warm = slice(case["cold_first"], 4 - case["cold_last"])  # of cold blocks none is measured
    for found, expected in zip(similarities, case["similarities"], strict=True):
        for one, other in zip(found[warm], expected[warm], strict=True):
            assert other is None or float(one) == pytest.approx(other, abs=2e-7)


@pytest.mark.parametrize("name", CASES)
def test_decoding_under_a_policy_is_the_literal_run(run, name):
    told, _, model, _, test_ids = run
    case, prompt = told["cases"][name], test_ids[:1, :16]
    policy, decided = watched(FfnSkipping(**{key: case[key] for key in KEYS}))
    with skipping(model, policy, middle_of_model(model, prompt)) as course:
        found = model.generate(prompt, max_new_tokens=13, do_sample=False, pad_token_id=0, eos_token_id=-1)
    assert found[0, 16:28].tolist() == case["tokens"]
    calls = [decided[place : place + 4] for place in range(0, len(decided), 4)]
    ran = [[block.ran[0, 0] for block in call] for call in calls]
    measured = [[None if block.similarity is None else block.similarity[0, 0] for block in call] for call in calls]
    check_course(case, ran, measured)
    assert course.fraction == pytest.approx(case["skipped_fraction"], abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_one_teacher_forced_pass_is_the_literal_run(run, name):
    told, _, model, _, test_ids = run
    case = told["cases"][name]
    ids = torch.cat([test_ids[:1, :16], torch.tensor([case["tokens"]])], dim=1)
    policy = FfnSkipping(**{key: case[key] for key in KEYS})
    blocks = capture_blocks(model, ids)
    states = embed(model, blocks, ids, 1)
    passed = [*pass_under(blocks, 4, "post_attention_layernorm", states, policy, decoded_numbers(ids.shape, 16), 1)]
    ran = torch.stack([~skipped[0] for skipped, _ in passed], dim=1)
    check_course(case, ran[16:], torch.stack([similarity[0] for _, similarity in passed], dim=1)[16:])
    assert bool(ran[:16].all())
    logits = model.lm_head(model.model.norm(states))
    assert logits[0, 15:-1].argmax(-1).tolist() == case["tokens"]


def unrotated(model, keys):
    """Keys of a sequence as they were before the rotation by their places."""
    cos, sin = model.model.rotary_emb(keys, torch.arange(keys.shape[2])[None])
    return apply_rotary_pos_emb(keys, keys, cos, -sin)[1]


@pytest.mark.parametrize(("name", "blocks"), [("gen_none", ()), ("gen_1_2", (1, 2)), ("gen_2", (2,))])
def test_skipping_blocks_at_prefill_with_unrotated_keys_is_the_authors_code(shared_dir, name, blocks):
    _, tensors = recorded(shared_dir, "shortgpt")
    model, prompt = recorded_model(shared_dir), recorded_tokens(shared_dir)[1][:2, :24]
    with torch.no_grad(), prefill_skipping(model, blocks):
        found = model(prompt, use_cache=True)
        cache, logits = found.past_key_values, found.logits[:, -1]
        for block in blocks:  # nothing has read them yet: prompts pass these blocks by
            cache.layers[block].keys = unrotated(model, cache.layers[block].keys)
        keys = torch.stack([layer.keys[:1] for layer in cache.layers])
        steps, ids = [], [logits.argmax(-1)]
        torch.testing.assert_close(logits, tensors[f"{name}.prefill_last_logits"], rtol=0, atol=2e-5)
        for _ in range(7):
            steps.append(model(ids[-1][:, None], past_key_values=cache, use_cache=True).logits[:, -1])
            ids.append(steps[-1].argmax(-1))
    torch.testing.assert_close(keys, tensors[f"{name}.key_cache"], rtol=0, atol=2e-5)
    torch.testing.assert_close(torch.stack(steps, 1), tensors[f"{name}.step_logits"], rtol=0, atol=5e-5)
    assert torch.stack(ids, 1).tolist() == tensors[f"{name}.greedy_ids"].tolist()


def test_rotated_keys_of_a_skipped_block_are_those_that_its_attention_would_cache(shared_dir):
    model, prompt = recorded_model(shared_dir), recorded_tokens(shared_dir)[1][:2, :24]
    as_recorded = recorded(shared_dir, "shortgpt")[1]["gen_2.key_cache"]
    seen = []

    def watch(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"], kwargs))

    with torch.no_grad(), prefill_skipping(model, (2,)):
        hook = model.model.layers[2].register_forward_pre_hook(watch, with_kwargs=True)
        keys = model(prompt, use_cache=True).past_key_values.layers[2].keys
        hook.remove()
    states, kwargs = seen[0]
    layer, cache = model.model.layers[2], type(kwargs["past_key_values"])(config=model.config)
    with torch.no_grad():
        layer.self_attn(layer.input_layernorm(states), **(kwargs | {"past_key_values": cache}))
    assert torch.equal(keys, cache.layers[2].keys)
    assert float((keys[:1] - as_recorded[2]).abs().max()) > 1
