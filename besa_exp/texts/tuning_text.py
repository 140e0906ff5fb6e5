"""The text that a model is tuned on: documents of a set or a file in a drawn order, as one stream of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from besa_exp.errors import ConfigurationError, Unavailable
from besa_exp.texts.calibration import exact_tokens
from besa_exp.texts.files import column_texts, format_of
from besa_exp.texts.sources import COLUMN, SET_NAMES, is_token_file, read_text
from besa_exp.texts.token_stream import TokenStream, open_token_stream, write_token_stream
from besa_exp.texts.tokens import Tokenizer, encode_document, read_token_file

SHARD = 2**19  # documents of a file of rows that are held, and drawn from, at a time


def tuning_tokens(
    source: str | Sequence[str] | Tensor,
    path: Path,
    *,
    tokenizer: Tokenizer | None,
    vocabulary: int,
    most: int,
    seed: int,
    offline: bool,
    column: str = COLUMN,
) -> TokenStream:
    """At most `most` tokens of `source` (a set, a text or token file, texts, or tokens) in the file `path`, which is
    taken as it is where it is there and whole. Documents are drawn in random order, of a large set from one shard after
    the other, and no more shards are read than that takes; tokens stay in theirs.

    ConfigurationError: the source cannot be read, or does not fit the model."""
    if path.is_file():
        return open_token_stream(path, check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    named = source if isinstance(source, str) else f"the given {'tokens' if isinstance(source, Tensor) else 'texts'}"
    documents = _documents(source, tokenizer, seed, offline, column)
    write_token_stream(_checked(documents, vocabulary, named), path, vocabulary, most)
    return open_token_stream(path)


def _documents(
    source: str | Sequence[str] | Tensor, tokenizer: Tokenizer | None, seed: int, offline: bool, column: str
) -> Iterator[Int[Tensor, " tokens"]]:
    if isinstance(source, Tensor):
        yield exact_tokens(source).flatten()
    elif isinstance(source, str) and is_token_file(source):
        yield read_token_file(Path(source).expanduser()).flatten()
    elif tokenizer is None:
        raise ConfigurationError(
            "recovery: the model has no tokenizer, so text cannot tune it; put the tokenizer's files into the model "
            "folder, or set recovery.path to a .safetensors file of input_ids"
        )
    else:
        for number, shard in enumerate(_shards(source, offline, column)):
            generator = torch.Generator().manual_seed(seed + number)
            order: list[int] = torch.randperm(len(shard), generator=generator).tolist()
            for index in order:
                yield encode_document(tokenizer, shard[index], number == 0 and len(shard) == 1)


def _shards(source: str | Sequence[str], offline: bool, column: str) -> Iterator[Sequence[str]]:
    """A set, a plain text or given texts whole; of a file of rows as many texts at a time as are held together."""
    if not isinstance(source, str):
        yield source
    elif source in SET_NAMES or format_of(source) == "plain":
        try:
            yield read_text(source, "calibration", offline, column).documents
        except Unavailable as error:
            raise ConfigurationError(f"recovery on {error}") from error
    else:
        texts = (text for text in column_texts(Path(source).expanduser(), column, "recovery.column") if text)
        while shard := list(islice((text for text in texts if text.strip()), SHARD)):
            yield shard


def _checked(documents: Iterator[Int[Tensor, " tokens"]], vocabulary: int, named: str) -> Iterator[Tensor]:
    count = 0
    for document in documents:
        count += len(document)
        if len(wrong := document[(document < 0) | (document >= vocabulary)]):
            raise ConfigurationError(
                f"recovery on {named}: token id {int(wrong.max())} is not in the model's vocabulary of {vocabulary}; "
                "give a text, or tokens that this model's tokenizer made"
            )
        yield document
    if not count:
        raise ConfigurationError(f"recovery: {named} holds no token; give a text with some")
