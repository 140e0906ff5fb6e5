"""Calibration tokens: what is drawn, what is read, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file
from tiny_llama import byte_tokenizer

from besa_exp.errors import ConfigurationError
from besa_exp.settings import CalibrationSettings
from besa_exp.texts.calibration import check_calibration, draw_windows, load_calibration
from besa_exp.texts.sources import HUB_FILES
from besa_exp.texts.tokens import write_token_file

CONTEXT = 64
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def settings(path: Path | str | None = None, **changes) -> CalibrationSettings:
    given = CalibrationSettings(
        name="local", path=None if path is None else str(path), num_samples=4, seq_len=16, seed=3
    )
    return replace(given, **changes)


def write_jsonl(path: Path, documents: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({column: document}) + "\n" for document in documents)
    return path


def write_parquet(path: Path, documents: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: documents}), path)
    return path


def words(count: int, seed: int = 0) -> str:
    """Text in which no 8 characters occur twice, so that a window is found at one place only."""
    letters = random.Random(seed)
    return "".join(letters.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(count))


def decoded(input_ids: torch.Tensor) -> list[str]:
    tokenizer = byte_tokenizer()
    return [str(tokenizer.decode(row.tolist())) for row in input_ids]


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, instead of this user's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub_cache: Path, name: str, use, documents: list[str]) -> None:
    """Put a set's file into the cache as a download does."""
    wanted = HUB_FILES[name][use]
    repository = hub_cache / f"datasets--{wanted.repository.replace('/', '--')}"
    write = write_parquet if wanted.filename.endswith(".parquet") else write_jsonl
    write(repository / "snapshots" / COMMIT / wanted.filename, documents, wanted.column)
    reference = repository / "refs" / (wanted.revision or "main")
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(COMMIT)


def refusal(given: CalibrationSettings, with_tokenizer: bool = True, vocabulary: int | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_calibration(given, byte_tokenizer() if with_tokenizer else None, CONTEXT, True, vocabulary=vocabulary)
    return str(caught.value)


# What is drawn


def test_equal_seeds_draw_equal_tokens_and_other_seeds_others(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [words(80, seed) for seed in range(20)])
    first, again, other = (
        load_calibration(settings(path, seed=seed), byte_tokenizer(), CONTEXT, True) for seed in (3, 3, 4)
    )
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.tokens_sha256 == again.tokens_sha256 != other.tokens_sha256


def test_a_window_lies_inside_one_document_and_each_document_gives_one_before_any_gives_two(tmp_path):
    documents = [words(40, seed) for seed in range(6)] + ["short"] * 30
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    calibration = load_calibration(settings(path, num_samples=6), byte_tokenizer(), CONTEXT, True)
    found = [
        next(n for n, document in enumerate(documents) if window[3:] in document)
        for window in decoded(calibration.input_ids)
    ]
    assert sorted(found) == list(range(6))
    assert calibration.provenance["windows"] == "single documents"


def test_one_long_text_gives_windows_from_all_over_it(tmp_path):
    (tmp_path / "a.txt").write_text(words(5000))
    calibration = load_calibration(settings(tmp_path / "a.txt", num_samples=64), byte_tokenizer(), CONTEXT, True)
    starts = [words(5000).index(window[3:]) for window in decoded(calibration.input_ids)]
    assert calibration.input_ids.shape == (64, 16)
    assert min(starts) < 500
    assert max(starts) > 4500


def test_a_window_can_start_at_the_first_and_end_at_the_last_token():
    ids = torch.arange(18)
    drawn, _ = draw_windows("x", ["x"] * 200, lambda _: ids, settings(num_samples=200, seq_len=16, seed=0))
    assert {int(row[0]) for row in drawn} == {0, 1, 2}
    assert all(torch.equal(row, ids[int(row[0]) : int(row[0]) + 16]) for row in drawn)


def test_short_documents_are_packed_each_after_its_start_token(tmp_path, caplog):
    documents = [f"<{number:02}>" for number in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    calibration = load_calibration(settings(path, num_samples=8), byte_tokenizer(adds_bos=False), CONTEXT, True)
    stream = calibration.input_ids.flatten().tolist()
    starts = [place for place, token in enumerate(stream) if token == 256]
    assert starts == list(range(0, 128, 5))
    assert calibration.provenance["windows"] == "packed"
    assert calibration.provenance["document_start_token"] == 256
    assert "too few documents of 16 tokens" in caplog.text
    packed = str(byte_tokenizer().decode(stream, skip_special_tokens=True))
    assert all(document in documents for document in packed.replace(">", "> ").split()[:-1])


def test_a_tokenizer_without_special_tokens_packs_documents_as_they_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["ab"] * 40)
    calibration = load_calibration(settings(path), byte_tokenizer(specials=False), CONTEXT, True)
    assert "".join(decoded(calibration.input_ids)) == "ab" * 32
    assert calibration.provenance["document_start_token"] is None


def test_drawing_leaves_the_global_random_states_alone(tmp_path):
    (tmp_path / "a.txt").write_text(words(5000))
    before = torch.get_rng_state(), repr(numpy.random.get_state())  # noqa: NPY002 (beartype itself draws from random)
    load_calibration(settings(tmp_path / "a.txt"), byte_tokenizer(), CONTEXT, True)
    after = torch.get_rng_state(), repr(numpy.random.get_state())  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_the_hash_is_of_the_little_endian_ids_and_the_shape(tmp_path):
    (tmp_path / "a.txt").write_text(words(5000))
    calibration = load_calibration(settings(tmp_path / "a.txt"), byte_tokenizer(), CONTEXT, True)
    plain = b"".join(int(token).to_bytes(8, "little") for row in calibration.input_ids for token in row)
    assert calibration.tokens_sha256 == hashlib.sha256(plain + b"4x16").hexdigest()


# What is read


def test_every_text_format_gives_the_same_tokens(tmp_path):
    documents = [words(30, seed) for seed in range(10)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents) + "\n<|endoftext|>\n")
    paths = [
        tmp_path / "a.txt",
        write_jsonl(tmp_path / "a.jsonl", documents),
        write_jsonl(tmp_path / "b.jsonl.gz", documents),
        write_parquet(tmp_path / "c.parquet", documents),
    ]
    hashes = {load_calibration(settings(path), byte_tokenizer(), CONTEXT, True).tokens_sha256 for path in paths}
    assert len(hashes) == 1


def test_the_embedded_set_needs_no_file_and_records_what_it_was_read_from():
    calibration = load_calibration(
        settings(None, name="embedded", num_samples=64, seq_len=64), byte_tokenizer(), CONTEXT, True
    )
    assert calibration.input_ids.shape == (64, 64)
    assert calibration.name == "embedded"
    assert calibration.provenance["windows"] == "single documents"
    assert len(calibration.provenance["text_sha256"]) == 64
    assert calibration.provenance["versions"]["numpy"] == numpy.__version__


def test_c4_is_single_documents_of_the_first_training_shard(hub_cache):
    documents = [words(40, seed) for seed in range(4)]
    cached(hub_cache, "c4", "calibration", documents)
    calibration = load_calibration(settings(None, name="c4"), byte_tokenizer(), CONTEXT, True)
    assert all(any(window[3:] in document for document in documents) for window in decoded(calibration.input_ids))
    assert calibration.provenance["revision"] == COMMIT
    assert calibration.provenance["file"] == "en/c4-train.00000-of-01024.json.gz"


@pytest.mark.parametrize("name", ["wikitext2", "ptb"])
def test_wikitext2_and_ptb_calibrate_with_one_text_joined_by_spaces(hub_cache, name):
    lines = [words(9, seed) for seed in range(40)]
    cached(hub_cache, name, "calibration", lines)
    calibration = load_calibration(settings(None, name=name), byte_tokenizer(adds_bos=False), CONTEXT, True)
    assert all(window in " ".join(lines) for window in decoded(calibration.input_ids))
    assert calibration.provenance["joined_by"] == " "


def test_a_token_file_is_read_as_exact_tokens_whatever_the_window_settings_say(tmp_path):
    ids = torch.randint(258, (5, 20), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids.to(torch.int32)}, tmp_path / "t.safetensors")
    calibration = load_calibration(settings(tmp_path / "t.safetensors"), None, CONTEXT, True, vocabulary=258)
    assert torch.equal(calibration.input_ids, ids)
    assert calibration.input_ids.dtype == torch.int64


def test_saved_tokens_are_read_back_with_the_same_hash(tmp_path):
    (tmp_path / "a.txt").write_text(words(5000))
    drawn = load_calibration(settings(tmp_path / "a.txt"), byte_tokenizer(), CONTEXT, True)
    write_token_file(drawn.input_ids, tmp_path / "tokens.safetensors")
    read = load_calibration(settings(tmp_path / "tokens.safetensors"), None, CONTEXT, True)
    assert torch.equal(read.input_ids, drawn.input_ids)
    assert read.tokens_sha256 == drawn.tokens_sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "tokens.safetensors"]


# What is refused


def test_too_little_text_says_what_is_needed_and_what_there_is(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["0123456789"] * 4)
    message = refusal(settings(path))
    assert "4 windows of 16 tokens need 64 tokens and it has 44, enough for 2" in message
    assert "calibration.num_samples" in message


def test_a_text_that_is_long_enough_for_one_window_only_is_not_drawn_from_over_and_over(tmp_path):
    (tmp_path / "a.txt").write_text(words(20))
    assert "enough for 1" in refusal(settings(tmp_path / "a.txt"))


def test_a_window_beyond_the_context_is_refused_with_both_lengths(tmp_path):
    (tmp_path / "a.txt").write_text(words(5000))
    message = refusal(settings(tmp_path / "a.txt", seq_len=65))
    assert "65 tokens" in message
    assert "context of 64" in message
    assert "calibration.seq_len=64" in message


def test_text_without_a_tokenizer_names_both_remedies(tmp_path):
    (tmp_path / "a.txt").write_text(words(5000))
    message = refusal(settings(tmp_path / "a.txt"), with_tokenizer=False)
    assert "no tokenizer" in message
    assert ".safetensors" in message


def test_a_set_that_is_not_cached_offline_is_refused_with_the_way_to_get_it(hub_cache):
    message = refusal(settings(None, name="c4"))
    assert "offline=true" in message
    assert "hf download" in message
    assert check_calibration(settings(None, name="c4"), CONTEXT) == []


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def truncated(path: Path) -> Path:
    return write_bytes(path, path.read_bytes()[:-100])


UNREADABLE = {  # what is wrong: (how to make the file in a folder, what the message must say)
    "missing": (lambda folder: folder / "nothing.txt", "no such file"),
    "a folder": (lambda folder: folder, "is a folder"),
    "a device": (lambda folder: Path("/dev/null"), "is a pipe or device"),
    "another kind": (lambda folder: write_bytes(folder / "a.docx", b"x"), ".jsonl, .json, .parquet"),
    "not UTF-8": (lambda folder: write_bytes(folder / "a.txt", "caf\u00e9".encode("latin-1")), "byte 3"),
    "empty": (lambda folder: write_bytes(folder / "a.txt", b"\n \n"), "no text"),
    "no bytes": (lambda folder: write_bytes(folder / "a.txt", b""), "the file is empty"),
    "no rows": (lambda folder: write_bytes(folder / "a.jsonl", b"\n"), "the file is empty"),
    "a list": (lambda folder: write_bytes(folder / "a.json", b'[{"text": "a"}]'), "jq -c"),
    "a number": (lambda folder: write_bytes(folder / "a.jsonl", b'{"text": 3}\n'), "int, not text"),
    "UTF-16": (lambda folder: write_bytes(folder / "a.txt", "text".encode("utf-16")), "iconv -f utf-16"),
    "broken gzip": (
        lambda folder: write_bytes(folder / "a.jsonl.gz", gzip.compress(b"x" * 99)[:10] + b"rest"),
        "cannot be",
    ),
    "truncated gzip": (lambda folder: truncated(write_jsonl(folder / "a.jsonl.gz", [words(3000)])), "line 1"),
    "numbers": (lambda folder: write_parquet(folder / "a.parquet", [3], "text"), "int, not text"),  # type: ignore[list-item]
    "truncated parquet": (lambda folder: truncated(write_parquet(folder / "a.parquet", [words(3000)])), "parquet"),
}


@pytest.mark.parametrize("wrong", UNREADABLE)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, wrong):
    make, reason = UNREADABLE[wrong]
    path = make(tmp_path)
    message = refusal(settings(path))
    assert str(path) in message
    assert reason in message


TOKEN_FILES = {
    "another key": ({"ids": torch.ones(2, 8, dtype=torch.int64)}, "holds ids"),
    "floats": ({"input_ids": torch.ones(2, 8)}, "F32"),
    "one dimension": ({"input_ids": torch.ones(8, dtype=torch.int64)}, "[8]"),
    "three dimensions": ({"input_ids": torch.ones(2, 2, 2, dtype=torch.int64)}, "[2, 2, 2]"),
    "negative": ({"input_ids": -torch.ones(2, 8, dtype=torch.int64)}, "negative"),
    "longer than the context": ({"input_ids": torch.ones(2, 65, dtype=torch.int64)}, "context of 64"),
    "a mask with holes": (
        {"input_ids": torch.ones(2, 8, dtype=torch.int64), "attention_mask": torch.tensor([[0] + [1] * 7, [1] * 8])},
        "'attention_mask' leaves tokens out",
    ),
    "more than is used": (
        {"input_ids": torch.ones(2, 8, dtype=torch.int64), "labels": torch.ones(2, 8, dtype=torch.int64)},
        "holds labels beside 'input_ids'",
    ),
    "one token a sample": ({"input_ids": torch.ones(2, 1, dtype=torch.int64)}, "one token each"),
    "beyond the vocabulary": ({"input_ids": torch.full((2, 8), 258)}, "vocabulary of 258"),
}


@pytest.mark.parametrize("wrong", TOKEN_FILES)
def test_a_token_file_that_does_not_fit_is_refused_with_the_reason(tmp_path, wrong):
    content, reason = TOKEN_FILES[wrong]
    save_file(content, tmp_path / "t.safetensors")
    assert reason in refusal(settings(tmp_path / "t.safetensors"), vocabulary=258)


def test_a_mask_of_ones_says_nothing_and_the_tokens_are_taken(tmp_path):
    ids = torch.arange(16).view(2, 8)
    save_file({"input_ids": ids, "attention_mask": torch.ones(2, 8, dtype=torch.bool)}, tmp_path / "t.safetensors")
    found = load_calibration(settings(tmp_path / "t.safetensors"), None, CONTEXT, True)
    assert torch.equal(found.input_ids, ids)


def test_tokens_of_text_beyond_the_vocabulary_are_blamed_on_the_tokenizer_and_those_of_a_file_are_not(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [words(80, seed) for seed in range(20)])
    assert "the tokenizer in the model's folder produced it" in refusal(settings(path), vocabulary=50)
    save_file({"input_ids": torch.full((2, 8), 258)}, tmp_path / "t.safetensors")
    assert "were made with another tokenizer" in refusal(settings(tmp_path / "t.safetensors"), vocabulary=258)


def test_a_truncated_token_file_is_refused(tmp_path):
    save_file({"input_ids": torch.ones(2, 8, dtype=torch.int64)}, tmp_path / "t.safetensors")
    whole = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(whole[:-8])
    assert "cannot be read" in refusal(settings(tmp_path / "t.safetensors"))


def test_checks_report_all_problems_together_with_the_nearest_name():
    problems = check_calibration(settings(None, name="wikitext", num_samples=0, batch_size=0, seed=-1), CONTEXT)
    text = "\n".join(problems)
    assert len(problems) == 4
    assert "did you mean wikitext2" in text
    assert all(key in text for key in ("calibration.num_samples=0", "calibration.batch_size=0", "calibration.seed=-1"))


def test_more_windows_than_a_text_can_have_are_refused_unread(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 100)
    (problem,) = check_calibration(settings(path, num_samples=10**9, seq_len=10), CONTEXT)
    assert "calibration.num_samples=1000000000: " in problem
    assert "a text of 100 characters, cannot have so many windows of 10 tokens" in problem
    assert len(check_calibration(settings(None, name="embedded", num_samples=10**9), CONTEXT)) == 1
    assert check_calibration(settings(path, num_samples=10, seq_len=10), CONTEXT) == []
    packed = path.with_name("a.txt.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert check_calibration(settings(packed, num_samples=10**9, seq_len=10), CONTEXT) == []  # its length is not known


def test_each_text_is_a_users_turn_where_the_chat_template_is_asked_for(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["question one", "question two"])
    tokenizer = byte_tokenizer()
    chat = settings(path, num_samples=2, seq_len=20, chat_template=True)
    with pytest.raises(ConfigurationError, match=r"no chat template.*leave it out"):
        load_calibration(chat, tokenizer, CONTEXT, offline=True)
    tokenizer.chat_template = "{{ bos_token }}user: {{ messages[0]['content'] }}."  # 1 + 6 + 12 + 1 tokens
    found = load_calibration(chat, tokenizer, CONTEXT, offline=True)
    assert sorted(decoded(found.input_ids)) == ["<s>user: question one.", "<s>user: question two."]
    assert (found.input_ids[:, 0] == 256).all()
    assert (found.input_ids[:, 1] != 256).all()  # the template's, and no other
    assert found.provenance["chat_template"] is True
    plain = load_calibration(replace(chat, chat_template=False, seq_len=8), tokenizer, CONTEXT, True).provenance
    assert "chat_template" not in plain
    assert found.provenance.keys() == plain.keys() - {"tokenizer_adds_bos", "document_start_token"} | {"chat_template"}
    tokens = tmp_path / "tokens.safetensors"
    write_token_file(found.input_ids, tokens)
    assert "exact tokens already" in check_calibration(replace(chat, path=str(tokens)), CONTEXT)[0]


def test_a_conversation_is_written_whole_by_the_chat_template(tmp_path):
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "told"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in (turns, "[1] is it")))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['role'][0] }}:{{ turn['content'] }}{% endfor %}"
    chat = settings(path, num_samples=2, seq_len=11, chat_template=True, column="messages")
    assert check_calibration(chat, CONTEXT) == []
    found = load_calibration(chat, tokenizer, CONTEXT, offline=True)
    assert sorted(decoded(found.input_ids)) == ["u:[1] is it", "u:aska:told"]
    (problem,) = check_calibration(replace(chat, chat_template=False), CONTEXT)
    assert problem.endswith("with calibration.column, or give calibration.chat_template=true")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigurationError, match=r"template refuses a conversation.*roles must alternate"):
        load_calibration(chat, tokenizer, CONTEXT, offline=True)
