"""A policy is decided for one model on its calibration tokens; scores under it are other scores than without."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from tiny_llama import tiny_llama

from besa_exp.checkpoints.load import LoadedModel
from besa_exp.errors import RunError
from besa_exp.evaluation.checks import check_skipping
from besa_exp.evaluation.merging import remaining
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.evaluation.policies import Skipping, check_skips, decide
from besa_exp.evaluation.prompt_skipping import passing_prompts, prefill_skipping
from besa_exp.evaluation.score import Scores
from besa_exp.evaluation.scores import evaluate
from besa_exp.settings import EvaluatorSettings, SkippingSettings
from besa_exp.texts.token_files import token_file_shape
from besa_exp.texts.tokens import write_token_file

IDS = torch.randint(3, 200, (4, 24), generator=torch.Generator().manual_seed(9))


def loaded(model: Any = None) -> LoadedModel:
    model = tiny_llama(num_hidden_layers=8, seed=4) if model is None else model
    return LoadedModel(model.requires_grad_(False).eval(), None, None, Path())


def wanted(name: Any, **changes: Any) -> Skipping:
    settings = SkippingSettings(name, **changes)
    return Skipping(settings, IDS if settings.is_calibrated else None)


@pytest.mark.parametrize(
    ("name", "near", "prompt"), [("ffn", 0.04, 0), ("ffn", 0.04, 6), ("static", 0.0, 0), ("random", 0.06, 0)]
)
def test_a_quarter_of_the_ffns_is_skipped_where_a_quarter_is_asked_for(name: str, near: float, prompt: int) -> None:
    one = loaded()
    decided = decide(one, wanted(name, fraction=0.25, prompt_tokens=prompt))
    with decided.on(one.model) as course:
        perplexity(one.model, IDS, 24, 2)
    assert course.counted == 8 * (IDS.numel() - 4 * prompt)
    assert course.fraction == pytest.approx(0.25, abs=near)
    assert name != "ffn" or course.fraction == decided.found["skipped"]
    assert decided.record(course)["skipped"] == course.fraction


def test_static_blocks_are_those_whose_ffn_turns_states_least_and_not_cold() -> None:
    one = loaded()
    between: list[torch.Tensor] = []
    turning: list[float] = []

    def after(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        cosines = torch.nn.functional.cosine_similarity(between[-1].double(), output.double(), dim=-1)
        turning.append(-float(cosines[:, 21:].mean()))

    model: Any = one.model
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: between.append(args[0]))
        layer.register_forward_hook(after)
    model(IDS, use_cache=False)
    expected = sorted(sorted(range(1, 7), key=lambda block: turning[block])[:3])
    assert decide(loaded(), wanted("static", fraction=0.35, prompt_tokens=21)).found == {"blocks": expected}


def test_prompts_pass_the_blocks_of_least_influence_that_are_not_cold() -> None:
    one = loaded()
    model: Any = one.model
    states = model(IDS, output_hidden_states=True, use_cache=False).hidden_states[:-1]  # the last is normed
    kept = [torch.nn.functional.cosine_similarity(*pair, dim=-1).mean() for pair in itertools.pairwise(states)]
    expected = sorted(sorted(range(1, 7), key=lambda block: 1 - float(kept[block]))[:2])
    decided = decide(one, wanted("shortgpt_gen", fraction=0.25, prompt_tokens=6))
    assert decided.found == {"blocks": expected}
    with decided.generating(model) as course:
        model.generate(IDS[:, :6], max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=-1)
    assert decided.record(course)["skipped"] == 2 / 8


def test_prompts_that_pass_blocks_in_one_pass_are_prefill_and_decoding() -> None:
    model = loaded().model
    with passing_prompts(model, (2, 5), 6) as course:
        expected = model(IDS, use_cache=False).logits
    with torch.no_grad(), prefill_skipping(model, (2, 5)) as prefill:
        found = model(IDS[:, :6], use_cache=True)
        held, tokens = found.past_key_values, IDS[:, 6:].split(1, dim=1)
        logits = [found.logits, *(model(ids, past_key_values=held, use_cache=True).logits for ids in tokens)]
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)
    assert (course.skipped, course.counted) == (2 * 4 * 6, 8 * 4 * 6) == (prefill.skipped, prefill.counted)
    assert not torch.allclose(expected, model(IDS).logits, atol=1e-3)


def test_padding_on_the_right_is_nobodys_and_changes_nothing() -> None:
    one = loaded()
    decided = decide(one, wanted("ffn", threshold=0.0, span=2))
    ids = IDS.clone()
    ids[:, 7] = 0  # inside the text the same id is a token
    padded = torch.cat([ids, torch.zeros(4, 3, dtype=torch.long)], 1)
    with decided.on(one.model, 0) as course:
        found = one.model(padded, use_cache=False).logits[:, :24]
    with decided.on(one.model) as plain:
        expected = one.model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (course.skipped, course.counted) == (plain.skipped, plain.counted)


@pytest.fixture
def scored(tmp_path: Path) -> tuple[EvaluatorSettings, LoadedModel]:
    write_token_file(IDS, tmp_path / "tokens.safetensors")
    assert token_file_shape(tmp_path / "tokens.safetensors") == (4, 24)
    return EvaluatorSettings("x", (str(tmp_path / "tokens.safetensors"),)), loaded()


def test_the_record_says_what_was_asked_found_and_skipped_and_is_read_again(scored: Any) -> None:
    settings, one = scored
    (name,) = settings.perplexity_sets
    scores = evaluate(one, settings, True, 0, lambda text: None, skipping=wanted("ffn", fraction=0.25))
    dense = evaluate(one, settings, True, 0, lambda text: None)
    record = scores.to_dict()["skipping"][name]
    assert record["name"] == "ffn"
    assert record["skipped"] == pytest.approx(record["found"]["skipped"]) == pytest.approx(0.25, abs=0.04)
    assert scores.perplexity[name] != dense.perplexity[name]
    assert "skipping" not in dense.to_dict()
    again = Scores.from_dict({**scores.to_dict(), "provenance": scores.provenance})
    assert again.to_dict() == scores.to_dict()
    assert Scores.from_dict(scores.to_dict()).scores[0].label == f"perplexity {name} (skipping=ffn)"


def test_a_score_under_another_policy_is_a_conflict(scored: Any) -> None:
    settings, one = scored
    under = SkippingSettings("random", fraction=0.25)
    scores = evaluate(one, settings, True, 0, lambda text: None, skipping=Skipping(under))
    results = {**scores.to_dict(), "provenance": scores.provenance}
    assert remaining(settings, 0, 256, results, skipping=under).conflicts == ()
    for other in (None, SkippingSettings("random", fraction=0.5)):
        (conflict,) = remaining(settings, 0, 256, results, skipping=other).conflicts
        assert "skipping {'name': 'random', 'fraction': 0.25" in conflict


def test_models_that_cannot_skip_are_refused_before_they_are_pruned() -> None:
    one = loaded(tiny("gpt_neox"))
    with pytest.raises(RunError, match="no state between attention and FFN"):
        check_skips(one, SkippingSettings("ffn", fraction=0.25))
    check_skips(one, SkippingSettings("shortgpt_gen", fraction=0.25, prompt_tokens=3))
    with pytest.raises(RunError, match=r"names block 8; the model has 8"):
        check_skips(loaded(), SkippingSettings("static", blocks=(8,)))


@pytest.mark.parametrize(
    ("changes", "load", "reason"),
    [
        ({"name": "ffn"}, "auto", "does not say how much to skip; set skipping.threshold or skipping.fraction"),
        ({"name": "random"}, "auto", "set skipping.fraction"),
        ({"name": "random", "fraction": 1.5}, "auto", r"skipping.fraction=1.5: must be in \[0, 1\]"),
        ({"name": "ffn", "threshold": 3.0}, "auto", "or 2, which never skips"),
        ({"name": "ffn", "fraction": 0.1, "span": 0}, "auto", "skipping.span=0: must be at least 1"),
        ({"name": "shortgpt_gen", "fraction": 0.1}, "auto", "skipping.prompt_tokens=0: must be at least 1"),
        ({"name": "static", "blocks": (-1,)}, "auto", "must not be negative, as blocks are counted from 0"),
        ({"name": "ffn", "fraction": 0.1}, "streamed", "set model.load=whole"),
    ],
)
def test_bad_settings_are_told(changes: dict[str, Any], load: str, reason: str) -> None:
    (problem,) = check_skipping(SkippingSettings(**changes), load)
    assert re.search(reason, problem)
    assert check_skipping(SkippingSettings("ffn", fraction=0.25)) == []
