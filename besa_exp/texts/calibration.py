"""Calibration tokens: random windows of long documents, as the BESA paper draws them from C4.

A document gives a window only when it is at least that long, so no window holds two documents. Documents are visited in
random order and give one window each before any gives a second; one of T tokens gives at most floor(T / seq_len), so
that windows of one text overlap little. Where the long documents are too few, all of them are laid end to end in random
order and cut into consecutive windows ("packed"); the record says which of the two was done. The authors' code draws
documents with replacement instead and never ends where none is long enough.

Everything is drawn from one generator seeded with `calibration.seed`; the global one is left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from besa_exp.errors import ConfigurationError, Unavailable
from besa_exp.settings import CalibrationSettings
from besa_exp.texts.calibration_check import check_calibration
from besa_exp.texts.sources import is_token_file, read_text
from besa_exp.texts.tokens import (
    Tokenizer,
    encode_chat,
    encode_document,
    read_token_file,
    special_tokens_record,
    tokens_sha256,
)

BEYOND_THE_EMBEDDING = (
    "the tokenizer in the model's folder produced it: it belongs to another model, or has added tokens for which the "
    "embedding has no rows; put the model's own tokenizer there"
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """The calibration set [sample, seq], int64, on the CPU, with what identifies it and where it came from."""

    input_ids: Int[Tensor, "sample seq"]
    tokens_sha256: str
    name: str
    provenance: dict[str, Any]


def load_calibration(
    settings: CalibrationSettings,
    tokenizer: Tokenizer | None,
    context: int,
    offline: bool,
    *,
    vocabulary: int | None = None,
) -> Calibration:
    """Read the set that `settings` names and draw its windows. A token file is taken as it is, whatever `num_samples`
    and `seq_len` say. `context` is the longest window the model takes; ids must be below `vocabulary`.

    ConfigurationError: the set cannot be loaded, is too short, or does not fit the model.
    """
    source = settings.path or settings.name
    if problems := check_calibration(settings, context):
        raise ConfigurationError(*problems)
    if is_token_file(source):
        input_ids, provenance = read_token_file(Path(source).expanduser()), {"file": source}
    elif tokenizer is None:
        raise ConfigurationError(
            f"calibration={source}: the model has no tokenizer, so text cannot calibrate it; put the tokenizer's files "
            "into the model folder, or set calibration.path to a .safetensors file of input_ids"
        )
    else:
        try:
            text = read_text(source, "calibration", offline, settings.column, settings.chat_template)
        except Unavailable as error:
            raise ConfigurationError(f"calibration={error}") from error
        input_ids, record = _windows(source, text.documents, settings, tokenizer)
        provenance = text.provenance | record
    if vocabulary is not None and int(input_ids.max()) >= vocabulary:
        raise ConfigurationError(
            f"calibration={source}: token id {int(input_ids.max())} is not in the model's vocabulary of {vocabulary}; "
            + ("these tokens were made with another tokenizer" if is_token_file(source) else BEYOND_THE_EMBEDDING)
        )
    return Calibration(input_ids, tokens_sha256(input_ids), source, provenance)


def given_calibration(
    given: Sequence[str] | Tensor,
    settings: CalibrationSettings,
    tokenizer: Tokenizer | None,
    context: int,
    vocabulary: int,
) -> Calibration:
    """Windows of texts in memory, drawn as those of a set are, or exact tokens, which are taken as they are.

    ConfigurationError: a text without a tokenizer, too little text, or tokens that do not fit the model."""
    if isinstance(given, Tensor):
        input_ids, provenance = exact_tokens(given), {"given": "tokens"}
    elif tokenizer is None:
        raise ConfigurationError("texts need a tokenizer; give one, or a tensor of token ids [sample, seq]")
    else:
        input_ids, record = _windows("the given texts", given, settings, tokenizer)
        provenance = {"given": f"{len(given)} texts"} | record
    if (length := input_ids.shape[1]) > context:
        raise ConfigurationError(f"windows of {length} tokens exceed the model's context of {context}; shorten them")
    if int(input_ids.max()) >= vocabulary or int(input_ids.min()) < 0:
        raise ConfigurationError(
            f"token ids from {int(input_ids.min())} to {int(input_ids.max())} are not all in the model's vocabulary of "
            f"{vocabulary}; use the model's own tokenizer"
        )
    return Calibration(input_ids, tokens_sha256(input_ids), settings.name, provenance)


def exact_tokens(given: Tensor) -> Int[Tensor, "sample seq"]:
    """On the CPU. ConfigurationError: no whole numbers [sample, seq]."""
    if given.ndim != 2 or given.is_floating_point() or given.shape[0] < 1 or given.shape[1] < 2:
        raise ConfigurationError(
            f"tokens of shape {list(given.shape)} and {given.dtype}: they must be whole numbers [sample, seq], at "
            "least one sample of two tokens"
        )
    return given.to("cpu", torch.int64)


def _windows(
    source: str, documents: Sequence[str], settings: CalibrationSettings, tokenizer: Tokenizer
) -> tuple[Int[Tensor, "sample seq"], dict[str, Any]]:
    """The windows, and how they were drawn."""
    plain = partial(encode_document, tokenizer, alone=len(documents) == 1)
    encode = partial(encode_chat, tokenizer) if settings.chat_template else plain
    input_ids, packed = draw_windows(source, documents, encode, settings)
    if packed:
        logger.warning(
            "calibration: %s has too few documents of %d tokens; all of them are laid end to end and cut into windows.",
            source,
            settings.seq_len,
        )
    record = {"seed": settings.seed, "windows": "packed" if packed else "single documents"}
    special = {"chat_template": True} if settings.chat_template else special_tokens_record(tokenizer, documents)
    return input_ids, special | record


def draw_windows(
    source: str,
    documents: Sequence[str],
    encode: Callable[[str], Int[Tensor, " tokens"]],
    settings: CalibrationSettings,
) -> tuple[Int[Tensor, "sample seq"], bool]:
    """The windows, and whether they had to be packed. ConfigurationError: `source` is too short."""
    num_samples, seq_len = settings.num_samples, settings.seq_len
    generator = torch.Generator().manual_seed(settings.seed)
    order: list[int] = torch.randperm(len(documents), generator=generator).tolist()
    encoded = (encode(documents[index]) for index in order)
    long = list(islice((ids for ids in encoded if len(ids) >= seq_len), num_samples))
    turns = [(turn, place) for place, ids in enumerate(long) for turn in range(min(len(ids) // seq_len, num_samples))]
    if len(turns) >= num_samples:
        windows = []
        for ids in (long[place] for _, place in sorted(turns)[:num_samples]):
            start = int(torch.randint(len(ids) - seq_len + 1, (), generator=generator))
            windows.append(ids[start : start + seq_len])
        return torch.stack(windows), False
    pieces, total, needed = [], 0, num_samples * seq_len
    for index in order:
        pieces.append(encode(documents[index]))
        total += len(pieces[-1])
        if total >= needed:
            return torch.cat(pieces)[:needed].view(num_samples, seq_len), True
    raise ConfigurationError(
        f"calibration={source}: too little text: {num_samples} windows of {seq_len} tokens need {needed:,} tokens and "
        f"it has {total:,}, enough for {total // seq_len}; lower calibration.num_samples or .seq_len, or give more"
    )
