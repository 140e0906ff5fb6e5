"""Where calibration and perplexity text comes from: named sets of the hub, the embedded text, local files.

The named sets follow the paper's protocol (arXiv 2402.16880, Section 4, as its authors' code carries it out): C4
calibrates with single documents of the first training shard and scores the first 1,100 validation documents joined by
spaces; WikiText-2 and PTB are one text each, joined by spaces, but for the WikiText-2 that is scored: by blank lines.
They are fetched as single files, so nothing but one shard of C4 is downloaded, no data set script runs, and offline
means that no connection is tried.

Nothing here imports torch, so that names and paths are checked before any long work.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from besa_exp.errors import ConfigurationError, Unavailable, did_you_mean, first_line
from besa_exp.hub.client import failures, hub_problem
from besa_exp.texts.files import Lines, column_texts, format_of, plain_text, readable_names

Use = Literal["calibration", "perplexity"]
logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
GIVEN = ("given texts", "given tokens")  # what a set is called that a program gives and that has no other name
SEPARATOR = "<|endoftext|>"  # between the documents of a plain text file
TOKENS = ".safetensors"  # the ending of a file of exact token ids
COLUMN = "text"  # where JSON lines and parquet have their documents, unless another column is chosen
COLUMN_KEYS: dict[Use, str] = {"calibration": "calibration.column", "perplexity": "evaluator.column"}


@dataclass(frozen=True)
class Text:
    """Documents to be tokenised, each by itself; one document where a protocol joins a set into one text.

    `max_windows` is where a protocol stops counting. `provenance` says what was read."""

    documents: Sequence[str]
    provenance: dict[str, Any] = field(default_factory=dict)
    max_windows: int | None = None


@dataclass(frozen=True)
class HubFile:
    """One file of a data set of the hub, and how its rows become documents (`joiner` None: each row is one)."""

    repository: str
    filename: str
    revision: str | None = None
    column: str = "text"
    joiner: str | None = None
    max_rows: int | None = None
    max_windows: int | None = None


_PTB, _SUPER_GLUE = "ptb-text-only/ptb_text_only", "aps/super_glue"
_CONVERTED = "refs/convert/parquet"  # the hub's conversion: such a data set itself is a script, and those no longer run
HUB_FILES: dict[str, dict[Use, HubFile]] = {
    "c4": {
        "calibration": HubFile("allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
        "perplexity": HubFile(
            "allenai/c4", "en/c4-validation.00000-of-00008.json.gz", joiner=" ", max_rows=1100, max_windows=256
        ),
    },
    "wikitext2": {
        "calibration": HubFile("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet", joiner=" "),
        "perplexity": HubFile("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet", joiner="\n\n"),
    },
    "ptb": {
        "calibration": HubFile(_PTB, "penn_treebank/train/0000.parquet", _CONVERTED, "sentence", " "),
        "perplexity": HubFile(_PTB, "penn_treebank/test/0000.parquet", _CONVERTED, "sentence", " "),
    },
}
SET_NAMES = (EMBEDDED, *HUB_FILES)
TASK_FILES = {
    "sst2": HubFile("nyu-mll/glue", "sst2/train-00000-of-00001.parquet"),
    "rte": HubFile("nyu-mll/glue", "rte/train-00000-of-00001.parquet"),
    "boolq": HubFile("google/boolq", "data/train-00000-of-00001.parquet"),
    "cb": HubFile(_SUPER_GLUE, "cb/train/0000.parquet", _CONVERTED),
    "wic": HubFile(_SUPER_GLUE, "wic/train/0000.parquet", _CONVERTED),
    "wsc": HubFile(_SUPER_GLUE, "wsc.fixed/train/0000.parquet", _CONVERTED),
    "multirc": HubFile(_SUPER_GLUE, "multirc/train/0000.parquet", _CONVERTED),
    "copa": HubFile(_SUPER_GLUE, "copa/train/0000.parquet", _CONVERTED),
}  # what recovery.task learns from


def is_token_file(source: str) -> bool:
    """Whether `source` names a file of exact token ids."""
    return source.lower().endswith(TOKENS)


def check_source(source: str, key: str, use: Use, column: str = COLUMN, chats: bool = False) -> list[str]:
    """What is wrong with `source` (the name of a set, or a path) as the value of `key`, in complete sentences. Of a
    file with columns the first row is read."""
    if source in SET_NAMES:
        return []
    path = Path(source).expanduser()
    if not (os.sep in source or path.suffix or path.exists()):
        near = did_you_mean(source, SET_NAMES)
        return [f"{key}={source}: no such set{near}; sets: {', '.join(SET_NAMES)}, or a path to a text or token file"]
    if not path.exists():
        return [
            f"{key}={source}: there is no such file; give the path of an existing one ({readable_names()}, {TOKENS})"
        ]
    if not path.is_file():
        kind, remedy = ("folder", "in it") if path.is_dir() else ("pipe or device, which is read once,", "on the disk")
        return [f"{key}={source}: is a {kind} and must be a file; name one text or token file {remedy}"]
    if format_of(path.name) is None and not is_token_file(source):
        return [f"{key}={source}: a file of this kind cannot be read; it must end in {readable_names()}, or {TOKENS}"]
    if not os.access(path, os.R_OK):
        return [f"{key}={source}: you may not read this file; change its permissions or name another"]
    empty = path.stat().st_size == 0
    if format_of(path.name) not in (None, "plain"):
        try:
            empty = not any(True for _ in column_texts(path, column, COLUMN_KEYS[use], chats))
        except ConfigurationError as error:
            return list(error.problems)
    return [f"{key}={source}: the file is empty; give one with text"] if empty else []


def read_text(source: str, use: Use, offline: bool, column: str = COLUMN, chats: bool = False) -> Text:
    """The documents of a named set or a local text file, there from `column` where it has columns, where with `chats`
    conversations may stand. Nulls are left out, counted and reported.

    Raises Unavailable for a set of the hub that cannot be loaded, ConfigurationError for a file that cannot be read.
    """
    if source == EMBEDDED:
        from besa_exp.texts.embedded.text import calibration_documents, perplexity_documents

        text = calibration_documents() if use == "calibration" else perplexity_documents()
        record = {"set": EMBEDDED, "documents": len(text.documents), "text_sha256": text.sha256}
        return Text(text.documents, record | {"versions": text.versions})
    if source in HUB_FILES:
        return _from_hub(source, use, offline)
    if problems := check_source(source, "path", use, column, chats):
        raise ConfigurationError(*problems)
    path = Path(source).expanduser()
    plain = format_of(path.name) == "plain"
    found, nulls = (_plain_documents(path), 0) if plain else _column(path, column, COLUMN_KEYS[use], None, chats)
    documents = tuple(text for text in found if text.strip())
    if not documents:
        raise ConfigurationError(f"{source}: holds no text; give a file with some")
    record = {"file": source, "file_sha256": file_sha256(path), "documents": len(documents)}
    return Text(documents, record if plain else record | {"column": column, "nulls": nulls})


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(source: str, use: Use, offline: bool) -> Path:
    """The local path of a named set's file, downloaded unless it is in the cache. Raises Unavailable."""
    return fetched(HUB_FILES[source][use], source, offline)


def fetched(wanted: HubFile, name: str, offline: bool) -> Path:
    """The same of a file that a person calls `name`."""
    from huggingface_hub import hf_hub_download

    silent = None if offline else hub_problem()
    cached = offline or silent is not None
    try:
        path = hf_hub_download(
            wanted.repository, wanted.filename, repo_type="dataset", revision=wanted.revision, local_files_only=cached
        )
    except failures() as error:
        why = f"the hub cannot be reached: {silent}," if silent else "offline=true"
        cause = f"{why} and it is not in the local cache" if cached else first_line(error)
        revision = f" --revision {wanted.revision}" if wanted.revision else ""
        raise Unavailable(
            f"{name}: cannot get {wanted.filename} of the data set {wanted.repository} ({cause}); give a local file "
            "instead of the name, or fetch it where there is a network: "
            f"hf download --repo-type dataset{revision} {wanted.repository} {wanted.filename}"
        ) from error
    return Path(path)


def _from_hub(source: str, use: Use, offline: bool) -> Text:
    wanted = HUB_FILES[source][use]
    path = fetch(source, use, offline)
    key = COLUMN_KEYS[use]
    if wanted.joiner is None and format_of(path.name) == "lines":
        rows, nulls = Lines.of(path, wanted.column, key)
        _warn_of_nulls(path, wanted.column, nulls, len(rows))
    else:
        rows, nulls = _column(path, wanted.column, key, wanted.max_rows)
    record = {
        "set": source,
        "repository": wanted.repository,
        "file": wanted.filename,
        "revision": commit_of(path),
        "documents": len(rows),
        "joined_by": wanted.joiner,
        "nulls": nulls,
    }
    return Text(rows if wanted.joiner is None else (wanted.joiner.join(rows),), record, wanted.max_windows)


def commit_of(path: Path) -> str | None:
    """The commit that something in the hub's cache belongs to: .../snapshots/COMMIT/..."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _plain_documents(path: Path) -> tuple[str, ...]:
    text = plain_text(path)
    return tuple(document.strip("\n") for document in text.split(SEPARATOR)) if SEPARATOR in text else (text,)


def _column(
    path: Path, column: str, key: str, max_rows: int | None, chats: bool = False
) -> tuple[tuple[str, ...], int]:
    """The first `max_rows` texts of a column, and the number of nulls that were passed over."""
    texts: list[str] = []
    nulls = 0
    for text in column_texts(path, column, key, chats):
        if len(texts) == max_rows:
            break
        if text is None:
            nulls += 1
        else:
            texts.append(text)
    _warn_of_nulls(path, column, nulls, len(texts))
    return tuple(texts), nulls


def _warn_of_nulls(path: Path, column: str, nulls: int, others: int) -> None:
    if nulls:
        logger.warning("%s: %d of %d rows have a null under %r and are left out", path, nulls, nulls + others, column)
