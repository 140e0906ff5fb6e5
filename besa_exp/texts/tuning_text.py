"""The text that a model is tuned on: documents of a set or a file in a drawn order, as one stream of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from besa_exp.errors import ConfigurationError, Unavailable
from besa_exp.texts.sources import COLUMN, is_token_file, stream_documents
from besa_exp.texts.token_stream import TokenStream, open_token_stream, write_token_stream
from besa_exp.texts.tokens import Tokenizer, encode_document, read_token_file

SHARD = 2**19  # documents that are held and drawn from at a time; a training shard of C4 has fewer


def tuning_tokens(
    source: str | Sequence[str] | Int[Tensor, "sample seq"],
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
    documents = _checked(_documents(source, tokenizer, seed, offline, column), vocabulary, named)
    try:
        write_token_stream(documents, path, vocabulary, most)
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(f"recovery: {named} holds no token; give a text with some") from error
    return open_token_stream(path)


def _documents(
    source: str | Sequence[str] | Tensor, tokenizer: Tokenizer | None, seed: int, offline: bool, column: str
) -> Iterator[Int[Tensor, " tokens"]]:
    if isinstance(source, Tensor):
        yield source.flatten()
    elif isinstance(source, str) and is_token_file(source):
        yield read_token_file(Path(source).expanduser()).flatten()
    elif tokenizer is None:
        raise ConfigurationError(
            "recovery: the model has no tokenizer, so text cannot tune it; put the tokenizer's files into the model "
            "folder, or set recovery.path to a .safetensors file of input_ids"
        )
    else:
        given = _read(source, offline, column) if isinstance(source, str) else iter(source)
        for number in count():
            shard = list(islice(given, SHARD))
            generator = torch.Generator().manual_seed(seed + number)
            for index in torch.randperm(len(shard), generator=generator).tolist():
                yield encode_document(tokenizer, shard[index], number == 0 and len(shard) == 1)
            if len(shard) < SHARD:
                return


def _read(source: str, offline: bool, column: str) -> Iterator[str]:
    try:
        yield from stream_documents(source, offline, column)
    except Unavailable as error:
        raise ConfigurationError(f"recovery on {error}") from error


def _checked(documents: Iterator[Int[Tensor, " tokens"]], vocabulary: int, named: str) -> Iterator[Tensor]:
    for document in documents:
        if len(document) and (greatest := int(document.max())) >= vocabulary:
            raise ConfigurationError(
                f"recovery on {named}: token id {greatest} is not in the model's vocabulary of {vocabulary}; give a "
                "text, or tokens that this model's tokenizer made"
            )
        yield document
