"""Token streams: what is written is read, a window at a time, by any reader of token files."""

from __future__ import annotations

import json

import pytest
import torch
from letters import Letters
from tiny_llama import byte_tokenizer

from besa_exp.errors import ConfigurationError
from besa_exp.texts import tuning_text
from besa_exp.texts.token_stream import open_token_stream, write_token_stream
from besa_exp.texts.tokens import read_token_file

DOCUMENTS = [torch.arange(start, start + length) for start, length in ((0, 7), (40, 0), (100, 30), (200, 13))]
TOKENS = torch.cat(DOCUMENTS)


@pytest.mark.parametrize(("vocabulary", "width"), [(300, 2), (1 << 16, 2), (1 << 17, 4)])
def test_what_was_written_is_read_by_windows_and_by_other_readers(tmp_path, vocabulary, width):
    path = tmp_path / "tokens.safetensors"
    sha256 = write_token_stream(DOCUMENTS, path, vocabulary)
    stream = open_token_stream(path, check=True)
    assert stream.sha256 == sha256
    assert stream.tokens.dtype.itemsize == width
    assert torch.equal(read_token_file(path), TOKENS)
    windows = stream.windows(8)
    assert len(windows) == 6
    assert torch.equal(windows.all(), TOKENS[:48].view(6, 8))
    assert torch.equal(windows[torch.tensor([4, 1, 4])], TOKENS[:48].view(6, 8)[[4, 1, 4]])


def test_the_last_windows_are_held_out(tmp_path):
    write_token_stream(DOCUMENTS, tmp_path / "t", 300)
    windows = open_token_stream(tmp_path / "t").windows(8)
    learned, held_out = windows.split(2)
    assert torch.equal(torch.cat([learned.all(), held_out.all()]), windows.all())
    assert (len(learned), len(held_out)) == (4, 2)
    with pytest.raises(ValueError, match=r"recovery\.held_out=6.*less than the 6 windows"):
        windows.split(6)


def test_no_more_documents_are_asked_for_than_are_needed(tmp_path):
    asked = []

    def documents():
        for document in DOCUMENTS:
            asked.append(len(document))
            yield document

    write_token_stream(documents(), tmp_path / "t", 300, most=20)
    assert torch.equal(torch.from_numpy(open_token_stream(tmp_path / "t").tokens.astype("i8")), TOKENS[:20])
    assert asked == [7, 0, 30]


def test_damaged_files_and_empty_texts_are_told(tmp_path):
    path = tmp_path / "t"
    with pytest.raises(ConfigurationError, match="recovery: the given texts holds no token"):
        tuning_text.tuning_tokens(
            ["", ""], path, tokenizer=byte_tokenizer(specials=False), vocabulary=256, most=9, seed=0, offline=True
        )
    assert not path.exists()
    write_token_stream(DOCUMENTS, path, 300)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    open_token_stream(path)
    with pytest.raises(ConfigurationError, match="other tokens than were written"):
        open_token_stream(path, check=True)
    path.write_bytes(content[:-4])
    with pytest.raises(ConfigurationError, match="was cut short"):
        open_token_stream(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    write_token_stream(DOCUMENTS, tmp_path / "t", 300)

    def failing():
        yield DOCUMENTS[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_token_stream(failing(), tmp_path / "t", 300)
    assert len(open_token_stream(tmp_path / "t", check=True).tokens) == len(TOKENS)
    assert [file.name for file in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ([[1, -100, 3]], "token id -100 is not in the model's vocabulary of 64"),
        ([[1, -100, 64]], "token id 64 is not in the model's vocabulary of 64"),
        ([[1.5, 2.0]], r"torch\.float32: they must be whole numbers"),
    ],
)
def test_given_tokens_that_are_no_ids_of_the_model_are_refused(tmp_path, tokens, told):
    with pytest.raises(ConfigurationError, match=told):
        tuning_text.tuning_tokens(
            torch.tensor(tokens), tmp_path / "t", tokenizer=None, vocabulary=64, most=9, seed=0, offline=True
        )
    assert not (tmp_path / "t").exists()


def test_a_large_text_is_drawn_shard_by_shard_and_read_no_further_than_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning_text, "SHARD", 4)
    rows = [json.dumps({"text": letter * 5}) for letter in "abcdefgh"]
    (tmp_path / "t.jsonl").write_text("\n".join([*rows, "no row at all"]))

    def tokens(most: int) -> str:
        path = tmp_path / f"{most}.safetensors"
        stream = tuning_text.tuning_tokens(
            str(tmp_path / "t.jsonl"), path, tokenizer=Letters(), vocabulary=256, most=most, seed=3, offline=True
        )
        return "".join(map(chr, stream.tokens))

    found = tokens(8 * 6)
    assert sorted(found[:24].split("\1")[1:]) == [letter * 5 for letter in "abcd"]
    assert sorted(found[24:].split("\1")[1:]) == [letter * 5 for letter in "efgh"]
    assert found[:24] != "".join("\1" + letter * 5 for letter in "abcd")
    with pytest.raises(ConfigurationError, match="line 9"):
        tokens(8 * 6 + 1)
