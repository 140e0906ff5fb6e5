"""Text files: every compression, mark and null is read alike, whatever the name says and whoever asks."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from besa_exp.errors import ConfigurationError
from besa_exp.texts import files
from besa_exp.texts.files import Lines, column_texts, format_of, plain_text, rows
from besa_exp.texts.sources import check_source, read_text

DOCUMENTS = ["a\u2028b\u0085c", "caf\u00e9 \U0001f600", " x "]


def json_lines(documents: Sequence[str | None], end: str = "\n") -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + end for text in documents).encode()


def zstd(content: bytes) -> bytes:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as file:
        file.write(content)
    return stream.getvalue().to_pybytes()


FORMS = {  # how the same lines may be stored
    "plain": ("a.jsonl", lambda content: content),
    "capitals": ("a.JSONL.GZ", gzip.compress),
    "json.gz": ("a.json.gz", gzip.compress),
    "gzip under another name": ("a.jsonl", gzip.compress),
    "not gzip under its name": ("a.jsonl.gz", lambda content: content),
    "xz": ("a.jsonl.xz", lzma.compress),
    "bz2": ("a.jsonl.bz2", bz2.compress),
    "zstd": ("a.jsonl.zst", zstd),
    "zstd of two frames": ("a.json.zst", lambda content: zstd(content[:40]) + zstd(content[40:])),
    "byte order mark": ("a.jsonl", lambda content: b"\xef\xbb\xbf" + content),
    "byte order mark in gzip": ("a.jsonl.gz", lambda content: gzip.compress(b"\xef\xbb\xbf" + content)),
    "lines of Windows": ("a.jsonl", lambda content: content.replace(b"\n", b"\r\n")),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_lines_are_read_from_every_form(tmp_path, form):
    name, stored = FORMS[form]
    (tmp_path / name).write_bytes(stored(json_lines(DOCUMENTS)))
    assert check_source(str(tmp_path / name), "calibration.path", "calibration") == []
    assert list(column_texts(tmp_path / name, "text", "key")) == DOCUMENTS
    assert [row for _, row in rows(tmp_path / name)] == [{"text": text} for text in DOCUMENTS]


@pytest.mark.parametrize("name", ["a.txt", "a.TXT.GZ", "a.raw.xz"])
def test_plain_text_keeps_what_only_looks_like_a_line_end_and_loses_its_mark(tmp_path, name):
    content = b"\xef\xbb\xbf" + "a\u2028b\r\nc\rd".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if "GZ" in name else content)
    assert plain_text(tmp_path / name) == "a\u2028b\nc\nd"


def test_a_null_is_passed_over_and_counted_in_every_format_alike(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a", None, "b", None]))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b", None]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = read_text(str(tmp_path / name), "calibration", True)
        assert found.documents == ("a", "b")
        assert (found.provenance["nulls"], found.provenance["column"]) == (2, "text")
        assert "2 of 4 rows" in caplog.text


def test_another_column_is_chosen_by_its_name_and_the_error_names_those_that_are_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a", "title": "b"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "title": ["b"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read_text(str(tmp_path / name), "perplexity", True, "title").documents == ("b",)
        with pytest.raises(ConfigurationError, match=r"no column 'text' but body, title; evaluator\.column=NAME"):
            read_text(str(tmp_path / name), "perplexity", True)


def test_a_column_that_is_not_there_is_told_before_anything_is_read_whole(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n{"body"')
    for name in ("no.txt", "no.jsonl"):  # found before a model is loaded
        (tmp_path / name).touch()
        assert check_source(str(tmp_path / name), "KEY", "perplexity")[0].startswith(
            f"KEY={tmp_path / name}: the file is"
        )
    (problem,) = check_source(str(tmp_path / "a.jsonl"), "calibration.path", "calibration")
    assert "no column 'text' but body; calibration.column=NAME" in problem
    assert check_source(str(tmp_path / "a.jsonl"), "calibration.path", "calibration", "body") == []


def test_the_line_of_a_broken_row_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for broken in (b'{"text": ', b'{"text": "\\ud83d"}', b'{"text": "\xed\xa0\xbd"}', b'["a"]', b"3"):
        path.write_bytes(b'{"text": "a"}\n\n' + broken + b"\n")
        with pytest.raises(ConfigurationError, match=r"a\.jsonl, line 3: "):
            list(column_texts(path, "text", "key"))


def test_a_surrogate_pair_that_is_whole_is_one_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert list(column_texts(tmp_path / "a.jsonl", "text", "key")) == ["\U0001f600"]


def test_names_say_which_format_a_file_has():
    names = {"a.txt": "plain", "b.tokens.zst": "plain", "c.JSON": "lines", "d.parquet": "parquet"}
    assert {name: format_of(name) for name in names} == names
    assert [format_of(name) for name in ("a.parquet.gz", "b.docx", "c", "d.gz")] == [None] * 4
    assert format_of(str(Path("x.txt") / "y")) is None


def test_lines_are_parsed_when_they_are_asked_for_and_give_the_texts_of_the_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json.gz"
    texts = [*DOCUMENTS, None, "a null in a text", *(f"document {number}" for number in range(95))]
    path.write_bytes(gzip.compress(json_lines(texts[:3]) + b"\n" + json_lines(texts[3:])))
    parsed: list[bytes] = []
    parse = files._json_object
    monkeypatch.setattr(files, "_json_object", lambda raw: parsed.append(raw) or parse(raw))
    lines, nulls = Lines.of(path, "text", "calibration.column")
    assert (len(lines), nulls, len(parsed)) == (99, 1, 2)  # those two alone have the word in them
    assert lines[50] == texts[51]
    assert len(parsed) == 3
    assert list(lines) == [text for text in column_texts(path, "text", "calibration.column") if text is not None]


def test_what_is_wrong_with_a_line_that_is_parsed_later_names_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one"]) + b"\n" + b'{"text": 3}\n{"text": \n')
    lines, _ = Lines.of(tmp_path / "a.jsonl", "text", "calibration.column")
    for place, told in ((1, "line 3: 'text' holds int, not text"), (2, "line 4: cannot be read: Expecting value")):
        with pytest.raises(ConfigurationError, match=told):
            lines[place]
