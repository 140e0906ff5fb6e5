"""`besa generate DIR skipping=...`: the model speaks without and with the policy, and both are timed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama

from besa_exp.checkpoints.load import LoadedModel
from besa_exp.cli.main import main
from besa_exp.evaluation.cost import paired_speeds
from besa_exp.evaluation.policies import Skipping, decide
from besa_exp.settings import SkippingSettings

IDS = torch.randint(3, 200, (1, 24), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    "settings",
    [
        SkippingSettings("ffn", threshold=0.0, span=2),
        SkippingSettings("static", blocks=(2, 5)),
        SkippingSettings("random", fraction=0.4),
        SkippingSettings("shortgpt_gen", blocks=(2, 5), prompt_tokens=9),
    ],
    ids=lambda settings: settings.name,
)
def test_what_is_generated_with_the_cache_is_what_one_pass_predicts_under_the_policy(
    settings: SkippingSettings,
) -> None:
    model: Any = tiny_llama(num_hidden_layers=8, seed=4).requires_grad_(False)
    decided = decide(LoadedModel(model, None, None, Path()), Skipping(settings))
    prompt = IDS[:, :9]
    given: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    with decided.generating(model) as course:
        made = model.generate(prompt, **given)
    pruned = SkippingSettings(**{**vars(settings), "prompt_tokens": 9})
    with decide(LoadedModel(model, None, None, Path()), Skipping(pruned)).on(model) as once:
        predicted = model(made[:, :-1], use_cache=False).logits.argmax(-1)
    assert made[0, 9:].tolist() == predicted[0, 8:].tolist()
    assert (course.skipped, course.counted) == (once.skipped, once.counted)
    assert 0 < course.fraction < 1
    assert made.tolist() != model.generate(prompt, **given).tolist()


def test_both_are_timed_on_the_same_prompt_and_a_skipped_ffn_is_not_run() -> None:
    model: Any = tiny_llama(num_hidden_layers=4, seed=4).requires_grad_(False)
    ran: list[int] = []
    for place, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, place=place: ran.append(place))
    decided = decide(LoadedModel(model, None, None, Path()), Skipping(SkippingSettings("static", blocks=(1, 2))))
    prefill, decode = paired_speeds(model, lambda: decided.generating(model), IDS[:, :9], 5)
    assert min(prefill.plain, prefill.under, decode.plain, decode.under, decode.quotient) > 0
    turns = ran.count(0) // 12  # a prompt and five tokens, without and with the policy
    assert ran.count(1) == ran.count(2) == turns * (6 + 1)


def test_the_command_shows_texts_speeds_and_the_skipped_share(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "embedded", "skipping=static", "skipping.blocks=[1,3]", "--prompt", "def f(", "--tokens", "3"]
    assert main(asked) == 0
    shown = capsys.readouterr().out
    for said in ("without skipping", "skipping=static", "prefill", "decode", "40.0 % of the FFNs of decoded tokens"):
        assert said in shown, shown
    assert shown.count("skipping=static") == 2  # of the text, and of the speeds


def test_a_folder_that_is_not_there_is_told_before_the_hub_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "nowhere"]) == 2
    assert "DIR=nowhere: there is no such folder, and it is no hub id" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["skipping=ffn", "evaluator=paper"], "evaluator=paper: besa generate takes skipping=NAME"),
        (["skipping.fraction=0.5"], "besa generate takes skipping=NAME"),
        (["skipping=ffn", "--chat"], "--chat takes no keys"),
        (["--chat"], "--chat: the tokenizer of embedded has no chat template"),
        (["skipping=ffn", "skipping.span=0"], r"skipping\.span=0: must be at least 1"),
    ],
)
def test_other_keys_are_refused(keys: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "embedded", *keys]) == 2
    assert re.search(said, capsys.readouterr().err)
