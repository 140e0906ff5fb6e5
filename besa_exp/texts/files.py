"""Files of text, read one way for every use: calibration, perplexity sets, local mirrors of evaluation data.

The file's name says which of three formats it has: plain text, JSON lines (an object a line) or parquet. The first two
may be compressed with gzip, xz, zstd or bzip2; their first bytes say with which, whatever the name says. Text is UTF-8,
and a byte order mark is dropped. JSON lines end at \\n alone, because U+2028 and the like are part of a text. In every
format a null means no text. A file that cannot be read is a ConfigurationError that names file, line and remedy.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from besa_exp.errors import ConfigurationError, first_line

Format = Literal["plain", "lines", "parquet"]
FORMATS: dict[str, Format] = {
    ".txt": "plain", ".raw": "plain", ".tokens": "plain",  # the last two are WikiText's own
    ".jsonl": "lines", ".json": "lines", ".parquet": "parquet",
}  # fmt: skip
COMPRESSED = (".gz", ".xz", ".zst", ".bz2")  # after one of the plain or lines formats
BOM = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def format_of(name: str) -> Format | None:
    """The format that a file's name stands for, in capitals or not; None: none that is read."""
    inner = name.lower()
    for ending in COMPRESSED:
        if inner.endswith(ending):
            found = FORMATS.get(Path(inner.removesuffix(ending)).suffix)
            return None if found == "parquet" else found
    return FORMATS.get(Path(inner).suffix)


def readable_names() -> str:
    return f"{', '.join(FORMATS)}, all but parquet also with {', '.join(COMPRESSED)}"


def plain_text(path: Path) -> str:
    """The whole text of a plain file, every line's end as \\n."""
    with _reading(path), _opened(path) as file:
        text = _decoded(file.read())
    return text.replace("\r\n", "\n").replace("\r", "\n")


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file of JSON lines or parquet with their number, which is the line's in a file of lines."""
    return _parquet_rows(path, None) if format_of(path.name) == "parquet" else _json_rows(path)


def column_texts(path: Path, column: str, key: str, chats: bool = False) -> Iterator[str | None]:
    """The texts under `column`, None where a null stands. `key` is what a person sets to choose another column. With
    `chats` a conversation is a text too, as JSON writes it."""
    parquet = format_of(path.name) == "parquet"
    for number, row in _parquet_rows(path, (column, key)) if parquet else _json_rows(path):
        yield _text(row, column, key, f"{path}, {'row' if parquet else 'line'} {number}", chats)


@dataclass(frozen=True)
class Lines(Sequence[str]):
    """The texts under `column` of a file of JSON lines but for nulls, each parsed when it is asked for: a calibration
    set takes some thousand of the 356,000 lines of a file of C4. What is wrong with a line is found then."""

    path: Path
    column: str
    key: str
    lines: Sequence[tuple[int, bytes]]

    @staticmethod
    def of(path: Path, column: str, key: str) -> tuple[Lines, int]:
        """The texts, and how many nulls were passed over."""
        with _reading(path), _opened(path) as file:
            lines = [(number, raw) for number, raw in enumerate(file, 1) if raw.strip()]
        every = Lines(path, column, key, lines)
        kept = [line for place, line in enumerate(lines) if b"null" not in line[1] or every[place] is not None]
        return replace(every, lines=kept), len(lines) - len(kept)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, place: Any) -> Any:
        number, raw = self.lines[place]
        with _reading(self.path, f", line {number}"):
            return _text(_json_object(raw), self.column, self.key, f"{self.path}, line {number}")


def _text(row: dict[str, Any], column: str, key: str, where: str, chats: bool = False) -> str | None:
    if column not in row:
        raise ConfigurationError(f"{where}: {_no_column(column, list(row), key)}")
    text = row[column]
    if chats and is_conversation(text):
        return json.dumps(text, ensure_ascii=False)
    if text is not None and not isinstance(text, str):
        other = ", or give calibration.chat_template=true" if is_conversation(text) and "calibration" in key else ""
        raise ConfigurationError(
            f"{where}: {column!r} holds {type(text).__name__}, not text; choose another column with {key}{other}"
        )
    return text


def is_conversation(value: Any) -> bool:
    """[{"role": ..., "content": ...}, ...], all of them texts."""
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(
        isinstance(turn, dict) and all(isinstance(turn.get(part), str) for part in ("role", "content"))
        for turn in turns
    )


def _no_column(column: str, there: list[str], key: str) -> str:
    return f"has no column {column!r} but {', '.join(there) or 'none'}; {key}=NAME chooses the one with the text"


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _reading(path, ", line 1") as place, _opened(path) as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield number, _json_object(raw)
            place[0] = f", line {number + 1}"


def _json_object(raw: bytes) -> dict[str, Any]:
    """One line. ValueError: what is wrong with it."""
    text = _decoded(raw)
    if text.lstrip().startswith("["):
        raise ValueError("it begins an array; write each of its objects on a line of its own (jq -c '.[]')")
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}; each line must be an object of JSON") from error
    if not isinstance(row, dict):
        raise ValueError(f'it is {type(row).__name__}, and each line must be an object such as {{"text": "..."}}')
    if b"\\u" in raw:
        _check_characters(row)
    return row


def _check_characters(row: dict[str, Any]) -> None:
    """ValueError: a text holds half of a surrogate pair, as a text cut between the two does."""
    for name, value in row.items():
        shown = json.dumps(value, ensure_ascii=False)
        try:
            shown.encode("utf-8")
        except UnicodeEncodeError as error:
            half = shown[error.start].encode("unicode_escape").decode("ascii")
            raise ValueError(f"{name!r} holds {half}, half of a surrogate pair, which is no character") from error


def _parquet_rows(path: Path, only: tuple[str, str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """`only`: the one column that is read, and the key that chooses it."""
    import pyarrow.parquet

    with _reading(path), pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if only and only[0] not in names:
            raise ConfigurationError(f"{path}: {_no_column(only[0], names, only[1])}")
        number = 0
        for batch in file.iter_batches(columns=[only[0]] if only else None):
            for row in batch.to_pylist():
                number += 1
                yield number, row


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's content as it was before compression, without a byte order mark."""
    with path.open("rb") as file:
        stream = _decompressed(file, file.peek(6))
        first = stream.peek(3)[:3]
        if first == BOM:
            stream.read(3)
        if first[:2] in UTF_16:
            raise ValueError("it is UTF-16 text, not UTF-8; convert it, for example with iconv -f utf-16 -t utf-8")
        yield stream  # type: ignore[misc]


def _decompressed(file: io.BufferedReader, first: bytes) -> io.BufferedReader:
    if first.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(fileobj=file))  # type: ignore[arg-type]
    if first.startswith(b"\xfd7zXZ\x00"):
        return io.BufferedReader(lzma.LZMAFile(file))  # type: ignore[arg-type]
    if first.startswith(b"BZh"):
        return io.BufferedReader(bz2.BZ2File(file))  # type: ignore[arg-type]
    if first.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"))
    return file


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"is not UTF-8 text (byte {error.start}); convert it, for example with iconv -t utf-8"
        ) from error


@contextmanager
def _reading(path: Path, start: str = "") -> Iterator[list[str]]:
    """Whatever the libraries raise while the file is read becomes one sentence; what is yielded holds the place."""
    place = [start]
    try:
        yield place
    except ConfigurationError:
        raise
    except Exception as error:  # not JSON, not what its first bytes promise, cut short, away
        said = str(error) if type(error) is ValueError else first_line(error)
        raise ConfigurationError(f"{path}{place[0]}: cannot be read: {said}") from error
