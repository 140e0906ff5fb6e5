"""Tokens of any amount of text in one file, written a document at a time and read a window at a time.

The file is an ordinary safetensors file whose `input_ids` [tokens] other readers of token files take too. Its header is
written last, into room that was left for it, as the number of tokens and their hash are known only then. Windows come
from mapped memory: nothing but the windows of a step is ever held.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from besa_exp.errors import ConfigurationError
from besa_exp.machine import atomic
from besa_exp.texts.token_files import TOKENS_KEY

ROOM = 1024  # bytes of the header; blanks fill it up, as the format allows
TYPES = {"U16": np.dtype("<u2"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
HASH_KEY = "sha256"


@dataclass(frozen=True)
class TokenStream:
    """A file's tokens, mapped, and the hash of their bytes as they lie."""

    tokens: np.memmap
    sha256: str

    def windows(self, seq_len: int) -> Windows:
        """The tokens as windows of `seq_len`, one after the other; what is left at the end is left out."""
        count = len(self.tokens) // seq_len
        return Windows(self.tokens[: count * seq_len].reshape(count, seq_len))


@dataclass(frozen=True)
class Windows:
    """Windows of tokens [sample seq] that stay where they lie until they are asked for."""

    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: Int[Tensor, " sample"]) -> Int[Tensor, "sample seq"]:
        """The windows of these numbers, which are at least 0."""
        assert ((numbers >= 0) & (numbers < len(self))).all(), "a window that is not there"
        return torch.from_numpy(self.rows[numbers.tolist()].astype(np.int64))

    def split(self, held_out: int) -> tuple[Windows, Windows]:
        """All but the last windows, and the last `held_out`. ConfigurationError: there are not more than that."""
        count, seq_len = self.rows.shape
        if not 0 < held_out < count:
            raise ConfigurationError(
                f"recovery.held_out={held_out}: must be at least 1 and less than the {count} windows of {seq_len} "
                "tokens that the text has; give more text or a smaller recovery.seq_len"
            )
        return Windows(self.rows[:-held_out]), Windows(self.rows[-held_out:])

    def all(self) -> Int[Tensor, "sample seq"]:
        return self[torch.arange(len(self))]


def write_token_stream(
    documents: Iterable[Int[Tensor, " _tokens"]], path: Path, vocabulary: int, most: int | None = None
) -> str:
    """Write the documents end to end, at most `most` tokens; no more documents are asked for than that takes. The hash
    of what was written. ids of a `vocabulary` of up to 65,536 take two bytes each."""
    name = "U16" if vocabulary <= 1 << 16 else "I32"
    digest, count = hashlib.sha256(), 0
    with atomic.replaced_file(path) as partial, partial.open("wb") as file:
        file.write(bytes(8 + ROOM))
        for document in documents:
            part = document[: None if most is None else most - count]
            assert not len(part) or 0 <= int(part.min()) <= int(part.max()) < vocabulary, "an id outside the vocabulary"
            content = part.numpy().astype(TYPES[name]).tobytes()
            file.write(content)
            digest.update(content)
            count += len(part)
            if count == most:
                break
        assert count, "a text without a token"
        entry = {"dtype": name, "shape": [count], "data_offsets": [0, count * TYPES[name].itemsize]}
        header = {"__metadata__": {HASH_KEY: digest.hexdigest()}, TOKENS_KEY: entry}
        file.seek(0)
        file.write(struct.pack("<Q", ROOM) + json.dumps(header).encode().ljust(ROOM))
    return digest.hexdigest()


def open_token_stream(path: Path, check: bool = False) -> TokenStream:
    """The file, mapped; `check` reads it whole and compares the hash. ConfigurationError: it is no such file, was cut
    short, or holds other tokens than were written."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        entry, sha256 = header[TOKENS_KEY], header["__metadata__"][HASH_KEY]
        tokens = np.memmap(path, TYPES[entry["dtype"]], "r", offset=8 + size, shape=tuple(entry["shape"]))
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ConfigurationError(
            f"{path}: is no token stream, or was cut short ({error}); remove it, and it is written again"
        ) from error
    if check and hashlib.sha256(tokens.data).hexdigest() != sha256:
        raise ConfigurationError(f"{path}: holds other tokens than were written; remove it, and it is written again")
    return TokenStream(tokens, sha256)
