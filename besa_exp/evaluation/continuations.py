"""What a model says: greedy continuations, next token = argmax over the vocabulary of p(token | what stands there)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from besa_exp.checkpoints.load import model_context
from besa_exp.errors import ConfigurationError


def prompt_ids(tokenizer: Any, prompt: str, device: torch.device, chat: bool = False) -> Int[Tensor, "one seq"]:
    """One prompt's tokens, as the tokenizer begins a text; with `chat` as a user's turn, the answer next."""
    if chat:
        turn = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return tokenizer(turn, add_special_tokens=False, return_tensors="pt").input_ids.to(device)
    return tokenizer(prompt, return_tensors="pt").input_ids.to(device)


@torch.no_grad()
def continuations(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, chat: bool = False) -> list[str]:
    """At most `tokens` new tokens after each prompt, without the prompt; fewer at the end of text or of the context.

    Prompts go one by one, without padding: what a model says does not depend on what it is asked besides.
    ConfigurationError: a prompt without a token, or longer than the context."""
    context = model_context(model)
    texts = []
    for prompt in prompts:
        ids = prompt_ids(tokenizer, prompt, model.device, chat)
        if not 0 < ids.shape[1] <= context:
            raise ConfigurationError(
                f"the prompt {prompt[:40]!r} has {ids.shape[1]} tokens, and the model takes 1 to {context}; shorten it"
            )
        room = max(1, min(tokens, context - ids.shape[1]))
        given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": room}
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        made = model.generate(ids, **given, pad_token_id=pad)[0, ids.shape[1] :]
        texts.append(tokenizer.decode(made, skip_special_tokens=True).strip())
    return texts
