"""Perplexity against a literal computation, and the scoring of sets: what is counted, recorded and not to be had."""

from __future__ import annotations

import gzip
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_llama import byte_tokenizer, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from besa_exp.checkpoints.load import LoadedModel
from besa_exp.errors import Unavailable
from besa_exp.evaluation.batches import halved_until_it_fits, rows_at_once, tokens_at_once
from besa_exp.evaluation.checks import PROMPTS, check_evaluator
from besa_exp.evaluation.perplexity import LOGITS_AT_ONCE, cut_windows, perplexity, sum_of_losses
from besa_exp.evaluation.score import Scores, partly_scored
from besa_exp.evaluation.scores import evaluate
from besa_exp.settings import EvaluatorSettings
from besa_exp.texts.sources import HUB_FILES
from besa_exp.texts.tokens import write_token_file

CONTEXT = 64
TEXT = " ".join(f"{number} is followed by {number + 1}." for number in range(60))


@pytest.fixture(scope="module")
def model():
    return tiny_llama(CONTEXT)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(258, (7 * 16 + 5,), generator=torch.Generator().manual_seed(0))


def literal_perplexity(model, windows: torch.Tensor) -> float:
    """exp of the mean of -log softmax(logits)[next token], every term and sum in fp64, one window at a time."""
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double()
        for place in range(len(window) - 1):
            row = logits[place].tolist()
            highest = max(row)
            log_total = highest + math.log(math.fsum(math.exp(value - highest) for value in row))
            losses.append(log_total - row[int(window[place + 1])])
    return math.exp(math.fsum(losses) / len(losses))


def settings(*sets: Path | str, **changes) -> EvaluatorSettings:
    return replace(EvaluatorSettings("test", tuple(str(name) for name in sets), batch_size=4), **changes)


def score(model, given: EvaluatorSettings, with_tokenizer: bool = True) -> Scores:
    loaded = LoadedModel(model, byte_tokenizer() if with_tokenizer else None, None, Path())
    return evaluate(loaded, given, True, 0, lambda _: None)


# The number


def test_perplexity_equals_a_literal_fp64_computation(model, tokens):
    result = perplexity(model, tokens, 16, 3)
    assert result.value == pytest.approx(literal_perplexity(model, tokens[:112].view(7, 16)), rel=1e-6)


def test_the_last_partial_window_is_dropped_and_the_predicted_tokens_are_counted(model, tokens):
    result = perplexity(model, tokens, 16, 4)
    assert (result.num_windows, result.seq_len, result.num_tokens) == (7, 16, 7 * 15)
    assert result == perplexity(model, tokens[:112], 16, 4)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100, "auto"])
def test_every_batch_size_gives_the_same_value(model, tokens, batch_size):
    assert perplexity(model, tokens, 16, batch_size).value == pytest.approx(
        perplexity(model, tokens, 16, 3).value, rel=1e-6
    )


def test_ready_windows_are_scored_as_they_are(model, tokens):
    windows = tokens[:112].view(7, 16)
    assert perplexity(model, windows, 64, 4) == perplexity(model, tokens, 16, 4)


def test_windows_do_not_see_each_other(model, tokens):
    windows = tokens[:112].view(7, 16)
    apart = [math.log(perplexity(model, window[None], 16, 1).value) for window in windows]
    assert math.log(perplexity(model, windows, 16, 7).value) == pytest.approx(sum(apart) / 7, rel=1e-6)


def test_losses_of_a_bf16_model_are_computed_in_fp32(tokens):
    half = tiny_llama(CONTEXT).bfloat16()
    windows = tokens[:112].view(7, 16)
    assert perplexity(half, windows, 16, 1).value == pytest.approx(literal_perplexity(half, windows), rel=1e-5)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest fp32 tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.dtype == torch.float32:
            self.numel = max(self.numel, output.numel())
        return output


def test_logits_are_never_copied_to_fp32_as_a_whole(monkeypatch):
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", 4 * 258)
    logits = torch.randn(3, 16, 258, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    ids = torch.randint(258, (3, 16), generator=torch.Generator().manual_seed(1))
    with Largest() as largest:
        total = sum_of_losses(logits, ids)
    exact = logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None])
    assert float(total) == pytest.approx(-float(exact.sum()), rel=1e-6)
    assert 0 < largest.numel <= 4 * 258


class SmallMemory(torch.nn.Module):
    """A model on a device that holds the logits of `fits` windows."""

    def __init__(self, model, fits: int):
        super().__init__()
        self.model, self.config, self.fits = model, model.config, fits
        self.get_input_embeddings = model.get_input_embeddings
        self.tried: list[int] = []

    def forward(self, input_ids, **options):
        self.tried.append(len(input_ids))
        if len(input_ids) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model(input_ids=input_ids, **options)


def test_a_batch_that_does_not_fit_is_halved_and_no_window_is_lost(model, tokens):
    small = SmallMemory(model, 2)
    result = perplexity(small, tokens, 16, "auto")
    assert small.tried == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert result == replace(perplexity(model, tokens, 16, 1), batch_size=1)
    assert perplexity(SmallMemory(model, 4), tokens, 16, 7).batch_size == 3


def test_a_window_that_does_not_fit_by_itself_makes_the_set_unavailable(model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    scores = score(SmallMemory(model, 0), settings(tmp_path / "a.txt"))
    assert "a single window of 64 tokens does not fit" in scores.unavailable[str(tmp_path / "a.txt")]


@pytest.mark.parametrize(("tokens_that_fit", "tried"), [(4, [4, 2, 1]), (0, [0])])
def test_a_question_that_does_not_fit_by_itself_ends_the_halving(tokens_that_fit, tried):
    sizes: list[int] = []

    def attempt(size):
        assert len(sizes) < 9, "it is tried without end"
        sizes.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(Unavailable, match="a single question does not fit"):
        halved_until_it_fits(attempt, tokens_that_fit, "question")
    assert sizes == tried


def test_an_automatic_batch_holds_fewer_tokens_where_the_vocabulary_is_large():
    small, large = tiny_llama(CONTEXT), tiny_llama(CONTEXT)
    large.resize_token_embeddings(200_000)
    assert tokens_at_once(large) < tokens_at_once(small) == 2048
    assert rows_at_once(tokens_at_once(small), CONTEXT) == 32
    assert rows_at_once(4096, 5000) == 1


def test_too_few_tokens_for_a_window_are_an_error(model, tokens):
    with pytest.raises(ValueError, match="15 tokens do not fill one window of 16"):
        perplexity(model, tokens[:15], 16, 4)


# Sets


def test_a_local_text_is_encoded_whole_and_its_record_says_how(model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    source = str(tmp_path / "a.txt")
    scores = score(model, settings(source, seq_len=32))
    ids = torch.tensor([256, *(byte_tokenizer()(TEXT).input_ids[1:])])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    record = scores.provenance["perplexity"][source]
    assert scores.perplexity[source] == pytest.approx(literal_perplexity(model, windows), rel=1e-6)
    assert (record["num_windows"], record["num_tokens"]) == (len(windows), len(windows) * 31)
    assert record["tokenizer_adds_bos"] is True
    assert not scores.unavailable


def test_each_of_several_documents_follows_a_start_token_also_where_the_tokenizer_adds_none(model, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(10)))
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(f"document {n}" for n in range(10)))
    given = settings(tmp_path / "a.jsonl", tmp_path / "a.txt", seq_len=20)
    with_bos = evaluate(LoadedModel(model, byte_tokenizer(), None, Path()), given, True, 0, lambda _: None)
    without = evaluate(LoadedModel(model, byte_tokenizer(adds_bos=False), None, Path()), given, True, 0, lambda _: None)
    assert len(set(with_bos.perplexity.values()) | set(without.perplexity.values())) == 1
    record = without.provenance["perplexity"][str(tmp_path / "a.txt")]
    assert (record["tokenizer_adds_bos"], record["document_start_token"]) == (False, 256)


def test_the_default_window_is_the_models_context_where_that_is_less_than_2048(model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    scores = score(model, settings(tmp_path / "a.txt"))
    assert scores.provenance["perplexity"][str(tmp_path / "a.txt")]["seq_len"] == CONTEXT


def test_a_token_file_needs_no_tokenizer_and_gives_the_value_of_its_text(model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    ids = torch.tensor(byte_tokenizer()(TEXT).input_ids)
    save_file({"input_ids": ids}, tmp_path / "stream.safetensors")
    save_file({"input_ids": ids[:320].view(10, 32)}, tmp_path / "windows.safetensors")
    save_file({"input_ids": ids[:320]}, tmp_path / "cut.safetensors")
    text = score(model, settings(tmp_path / "a.txt", seq_len=32))
    sets = [tmp_path / f"{name}.safetensors" for name in ("stream", "windows", "cut")]
    files = score(model, settings(*sets, seq_len=32), with_tokenizer=False)
    stream, windows, cut = (files.perplexity[str(name)] for name in sets)
    assert stream == text.perplexity[str(tmp_path / "a.txt")]
    assert windows == cut
    assert not files.unavailable


def test_c4_stops_after_1100_documents_joined_by_spaces_and_256_windows(model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    wanted = HUB_FILES["c4"]["perplexity"]
    file = tmp_path / "datasets--allenai--c4" / "snapshots" / "c0ffee" / wanted.filename
    file.parent.mkdir(parents=True)
    (file.parents[3] / "refs").mkdir()
    (file.parents[3] / "refs" / "main").write_text("c0ffee")
    documents = [f"{number:04}" for number in range(2000)]
    with gzip.open(file, "wt") as lines:
        lines.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    ids = torch.tensor(byte_tokenizer()(" ".join(documents[:1100])).input_ids)
    scores = score(model, settings("c4", seq_len=8))
    record = scores.provenance["perplexity"]["c4"]
    assert (record["num_windows"], record["documents"]) == (256, 1100)
    assert scores.perplexity["c4"] == pytest.approx(literal_perplexity(model, ids[: 256 * 8].view(256, 8)), rel=1e-6)


# What cannot be had


def test_a_set_that_cannot_be_had_is_none_with_its_reason_and_loses_no_other(model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "broken.jsonl").write_text("{")
    save_file({"input_ids": torch.full((2, 8), 258)}, tmp_path / "beyond.safetensors")
    save_file({"input_ids": torch.ones(2, 65, dtype=torch.int64)}, tmp_path / "long.safetensors")
    reasons = {
        "wikitext2": "hf download",
        str(tmp_path / "short.txt"): "6 tokens do not fill one window of 64",
        str(tmp_path / "broken.jsonl"): "line 1",
        str(tmp_path / "beyond.safetensors"): "vocabulary of 258",
        str(tmp_path / "long.safetensors"): "context of 64",
        str(tmp_path / "gone.txt"): "no such file",
    }
    scores = score(model, settings(*reasons, tmp_path / "a.txt"))
    assert scores.perplexity[str(tmp_path / "a.txt")] is not None
    assert all(scores.perplexity[name] is None for name in reasons)
    assert scores.unavailable.keys() == reasons.keys()
    assert all(reason in scores.unavailable[name] for name, reason in reasons.items())


def test_text_is_not_to_be_had_without_a_tokenizer(model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    scores = score(model, settings(tmp_path / "a.txt"), with_tokenizer=False)
    assert "no tokenizer" in scores.unavailable[str(tmp_path / "a.txt")]


def test_a_model_with_broken_logits_has_no_perplexity_and_says_so(tmp_path):
    broken = tiny_llama(CONTEXT)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    (tmp_path / "a.txt").write_text(TEXT)
    scores = score(broken, settings(tmp_path / "a.txt"))
    assert scores.perplexity[str(tmp_path / "a.txt")] is None
    assert "logits are not finite" in scores.unavailable[str(tmp_path / "a.txt")]


def test_logits_that_are_not_finite_where_nothing_is_predicted_count_too(tokens):
    broken = tiny_llama(CONTEXT)
    with torch.no_grad():
        broken.lm_head.weight[257] = -math.inf  # never the next token here, and no loss is infinite
    with pytest.raises(Unavailable, match="logits are not finite"):
        perplexity(broken, tokens.clamp(max=250), 16, 4)


def test_whatever_a_set_throws_is_its_reason_with_the_place_and_the_others_are_scored(model, tmp_path):
    def refuse(_, args, options):
        if options["input_ids"].max() == 251:
            raise IndexError("a kernel of somebody else")

    save_file({"input_ids": torch.full((2, 8), 251)}, tmp_path / "a.safetensors")
    save_file({"input_ids": torch.ones(2, 1, dtype=torch.int64)}, tmp_path / "b.safetensors")
    save_file({"input_ids": torch.ones(2, 8, dtype=torch.int64)}, tmp_path / "c.safetensors")
    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        scores = score(model, settings(*(tmp_path / f"{name}.safetensors" for name in "abc")))
    finally:
        handle.remove()
    thrown, short, scored = (str(tmp_path / f"{name}.safetensors") for name in "abc")
    assert re.fullmatch(
        r"IndexError: a kernel of somebody else \(test_perplexity\.py, line \d+\)", scores.unavailable[thrown]
    )
    assert "one token each" in scores.unavailable[short]
    assert scores.perplexity[scored] is not None


def test_a_loss_too_large_for_a_float_is_infinite_not_a_crash():
    huge = tiny_llama(CONTEXT)
    with torch.no_grad():
        huge.lm_head.weight.mul_(1e6)
    assert perplexity(huge, torch.arange(200), 16, 4).value == math.inf


# Checks before a run


def test_checks_report_every_problem_with_the_nearest_name(tmp_path):
    given = settings(
        "wikitext", tmp_path / "gone.txt", tasks=("piqaa", "boolq", "boolq"), seq_len=65, limit=0, batch_size=0,
        data_dir=str(tmp_path / "nowhere"),
    )  # fmt: skip
    problems = check_evaluator(given, CONTEXT)
    for words in (
        "did you mean wikitext2", "gone.txt: there is no such file", "did you mean piqa", "boolq is named twice",
        "evaluator.seq_len=64", "evaluator.limit=0", "evaluator.batch_size=0", "nowhere: there is no such folder",
    ):  # fmt: skip
        assert sum(words in problem for problem in problems) == 1, words
    assert len(problems) == 8


def test_checks_find_token_files_that_do_not_fit(tmp_path):
    save_file({"input_ids": torch.ones(2, 65, dtype=torch.int64)}, tmp_path / "long.safetensors")
    save_file({"input_ids": torch.ones(2, 8)}, tmp_path / "floats.safetensors")
    long, floats = check_evaluator(settings(tmp_path / "long.safetensors", tmp_path / "floats.safetensors"), CONTEXT)
    assert "65 tokens" in long
    assert "F32" in floats


def test_a_sound_request_has_no_problem(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    given = settings(
        "embedded", "c4", tmp_path / "a.txt", tasks=("piqa", "embedded_continuations"), data_dir=str(tmp_path)
    )
    assert check_evaluator(given, CONTEXT) == []


def test_the_first_windows_alone_are_scored_and_the_score_says_so(model, tokens, tmp_path):
    path = tmp_path / "windows.safetensors"
    write_token_file(cut_windows(tokens, 16), path)
    whole, first = (score(model, settings(path, prompts=(), **more)) for more in ({}, {"max_windows": 3}))
    literal = literal_perplexity(model, cut_windows(tokens, 16)[:3])
    assert first.perplexity[str(path)] == pytest.approx(literal, rel=1e-6)
    conditions = first.of("perplexity")[0].conditions
    assert conditions["tokens_sha256"] != whole.of("perplexity")[0].conditions["tokens_sha256"]
    assert partly_scored(first.scores) == {str(path): f"3 of {len(cut_windows(tokens, 16))} windows"}
    assert partly_scored(whole.scores) == {}
    more = score(model, settings(path, prompts=(), max_windows=10_000))
    assert more.of("perplexity")[0].conditions == whole.of("perplexity")[0].conditions


def test_text_samples_come_with_scores_and_a_model_that_cannot_speak_is_told_where_it_was_asked(model, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some words " * 50)
    assert [*score(model, settings(text)).texts] == [*PROMPTS]
    assert score(model, EvaluatorSettings("none")).texts == {}
    token_file = tmp_path / "windows.safetensors"
    write_token_file(torch.arange(64).view(2, 32), token_file)
    silent = score(model, settings(token_file), with_tokenizer=False)
    assert (silent.texts, silent.unavailable) == ({}, {})
    asked = score(model, settings(token_file, prompts=("Once",)), with_tokenizer=False)
    assert asked.unavailable == {"text samples": "the model has no tokenizer"}
