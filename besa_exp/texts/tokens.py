"""Text as token ids, and files of exact token ids.

A text is encoded as its tokenizer does by default, special tokens included. Where a set holds several documents, each
one begins with the tokenizer's BOS (its EOS where it has none), even if the tokenizer does not add it. Without it the
end of a document would run into the start of the next, and models trained on separate documents expect it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from besa_exp.errors import ConfigurationError, first_line
from besa_exp.machine.atomic import replaced_file
from besa_exp.texts.files import is_conversation
from besa_exp.texts.token_files import TOKENS_KEY, token_file_shape


@runtime_checkable
class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers. It also has `bos_token_id` and `eos_token_id`, each may be None."""

    def __call__(self, text: Any, **options: Any) -> Any: ...


def encode(tokenizer: Tokenizer, text: str) -> Int[Tensor, " tokens"]:
    """The token ids of one text, with the special tokens that the tokenizer adds by itself."""
    ids = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts its BOS before a text by itself."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and encode(tokenizer, "a")[:1].tolist() == [bos]


def document_start(tokenizer: Tokenizer) -> int | None:
    """The token that stands before each of several documents; None: the tokenizer has neither BOS nor EOS."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None else getattr(tokenizer, "eos_token_id", None)


def encode_document(tokenizer: Tokenizer, text: str, alone: bool) -> Int[Tensor, " tokens"]:
    """One document of a set; `alone`: the set holds no other, and it is encoded as a plain text."""
    ids = encode(tokenizer, text)
    start = None if alone else document_start(tokenizer)
    if start is None or ids[:1].tolist() == [start]:
        return ids
    return torch.cat([torch.tensor([start]), ids])


def encode_chat(tokenizer: Any, text: str) -> Int[Tensor, " tokens"]:
    """A conversation as the tokenizer's chat template writes it, its special tokens included; any other text is what a
    user says. ConfigurationError: there is no template, or it refuses the conversation."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigurationError(
            "calibration.chat_template=true: the tokenizer has no chat template, so its model follows none; leave it "
            "out, or put the instruct model's chat_template.jinja (or tokenizer_config.json) into the model's folder"
        )
    from jinja2 import TemplateError  # a template is text for jinja, which transformers imports for it

    try:
        written = tokenizer.apply_chat_template(conversation_in(text), tokenize=False)
    except TemplateError as error:
        raise ConfigurationError(
            f"calibration.chat_template=true: the tokenizer's template refuses a conversation ({first_line(error)}): "
            f"{text[:80]}; leave it out"
        ) from error
    ids = tokenizer(written, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def conversation_in(text: str) -> list[dict[str, str]]:
    """What `text` writes as JSON, a list of {"role", "content"}; else it is the one turn of a user."""
    with suppress(ValueError):
        if text.startswith("[") and is_conversation(turns := json.loads(text)):
            return turns
    return [{"role": "user", "content": text}]


def token_stream(tokenizer: Tokenizer, documents: Sequence[str]) -> Int[Tensor, " tokens"]:
    """All documents end to end."""
    return torch.cat([encode_document(tokenizer, document, alone=len(documents) == 1) for document in documents])


def special_tokens_record(tokenizer: Tokenizer, documents: Sequence[str]) -> dict[str, Any]:
    """What was done about BOS, for the record of a run."""
    return {
        "tokenizer_adds_bos": begins_with_bos(tokenizer),
        "document_start_token": None if len(documents) == 1 else document_start(tokenizer),
    }


def tokens_sha256(input_ids: Int[Tensor, "*shape"]) -> str:
    """sha256 of the ids as little-endian int64, followed by the shape as text, such as 128x2048."""
    digest = hashlib.sha256(input_ids.contiguous().numpy().astype("<i8").tobytes())
    digest.update("x".join(str(size) for size in input_ids.shape).encode())
    return digest.hexdigest()


def read_token_file(path: Path) -> Int[Tensor, "*shape"]:
    """`input_ids` as int64, [sample, seq] or [tokens]. ConfigurationError: not a token file."""
    token_file_shape(path)
    with safe_open(path, framework="pt") as file:
        input_ids = file.get_tensor(TOKENS_KEY).to(torch.int64)
    if input_ids.min() < 0:
        raise ConfigurationError(f"{path}: {TOKENS_KEY!r} holds negative ids; ids count from 0")
    return input_ids


def write_token_file(input_ids: Int[Tensor, "sample seq"], path: Path) -> None:
    """Write ids that `read_token_file` gives back; the file appears whole or not at all."""
    with replaced_file(path) as partial:
        save_file({TOKENS_KEY: input_ids.contiguous()}, partial)
