"""What a model says: the greedy path, as a loop over its logits finds it."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import byte_tokenizer, tiny_llama

from besa_exp.errors import ConfigurationError
from besa_exp.evaluation.continuations import continuations


def greedy(model, ids: list[int], tokens: int) -> list[int]:
    made: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            following = int(model(torch.tensor([ids + made]), use_cache=False).logits[0, -1].argmax())
        made.append(following)
        if following == model.config.eos_token_id:
            break
    return made


def test_each_prompt_goes_on_along_the_most_likely_tokens() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    prompts = ["Once", "A much longer prompt"]
    expected = [
        str(tokenizer.decode(greedy(model, tokenizer(prompt).input_ids, 12), skip_special_tokens=True)).strip()
        for prompt in prompts
    ]
    assert continuations(model, tokenizer, prompts, 12) == expected
    assert expected[0] != expected[1]


def test_a_chat_prompt_is_a_users_turn_that_waits_for_its_answer() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    tokenizer.chat_template = (
        "<s>{{ messages[0]['role'] }}:{{ messages[0]['content'] }}{% if add_generation_prompt %};{% endif %}"
    )
    ids = tokenizer("user:Once;").input_ids  # with its own BOS, and no second
    expected = str(tokenizer.decode(greedy(model, ids, 12), skip_special_tokens=True)).strip()
    assert continuations(model, tokenizer, ["Once"], 12, chat=True) == [expected]
    assert continuations(model, tokenizer, ["Once"], 12) != [expected]


def test_what_is_said_ends_with_the_context() -> None:
    model, tokenizer = tiny_llama(context=16), byte_tokenizer()
    (told,) = continuations(model, tokenizer, ["Ten bytes."], 100)
    assert len(told) <= 5  # 16 less BOS and ten bytes


def test_a_prompt_that_the_model_cannot_take_is_refused() -> None:
    """GPT-2 has no embedding for positions beyond its context: an IndexError of torch's."""
    model, tokenizer = tiny_llama(context=16), byte_tokenizer(adds_bos=False)
    for prompt, count in (("x" * 17, 17), ("", 0)):
        with pytest.raises(ConfigurationError, match=f"has {count} tokens, and the model takes 1 to 16"):
            continuations(model, tokenizer, [prompt], 4)
    assert continuations(model, tokenizer, ["x" * 16], 4)
