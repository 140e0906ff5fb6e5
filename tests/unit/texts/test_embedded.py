"""The embedded default: its text and split, its model folder, and its zero-shot task."""

import hashlib
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from besa_exp.texts.embedded.continuations import (
    CONTINUATION,
    ITEMS,
    ITEMS_PER_DOCUMENT,
    LONGEST_CONTEXT,
    _digest,
    _passages,
    continuation_items,
    task_dataset,
)
from besa_exp.texts.embedded.text import (
    MODEL_DIR,
    RUN_PACKAGES,
    TASK_NAME,
    TASKS_DIR,
    calibration_documents,
    embedded_text,
    is_held_out,
    perplexity_documents,
)


@cache
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True)


def paragraphs(documents: tuple[str, ...]) -> set[str]:
    return {part for document in documents for part in document.split("\n\n") if len(part) >= 40}


# --- text


def test_no_paragraph_is_on_both_sides_of_the_split():
    train, held_out = embedded_text("train"), embedded_text("held_out")
    assert not paragraphs(train.documents) & paragraphs(held_out.documents)
    assert not set(train.documents) & set(held_out.documents)


def test_both_sides_hold_enough_text_for_a_run():
    train = sum(map(len, embedded_text("train").documents))
    held_out = sum(map(len, embedded_text("held_out").documents))
    assert train > 2_000_000
    assert 0.05 < held_out / (train + held_out) < 0.2


@pytest.mark.parametrize(
    ("package", "name", "held_out"),
    [
        ("stdlib", "logging/__init__.py", True),
        ("stdlib", "inspect.py", True),
        ("numpy", "_core/defchararray.py", True),
        ("stdlib", "ast.py", False),
        ("numpy", "ma/core.py", False),
    ],
)
def test_the_split_follows_the_name_of_a_module_and_nothing_else(package: str, name: str, held_out: bool):
    assert is_held_out(package, name) is held_out


def test_the_text_names_its_hash_and_the_versions_it_was_read_from():
    text = embedded_text("held_out")
    assert text.sha256 == hashlib.sha256("\0".join(text.documents).encode()).hexdigest()
    assert set(text.versions) == set(RUN_PACKAGES)
    assert all(version[0].isdigit() for version in text.versions.values())


def test_the_calibration_set_is_a_part_of_training_and_the_perplexity_set_of_held_out():
    assert set(calibration_documents().documents) < set(embedded_text("train").documents)
    assert set(perplexity_documents().documents) <= set(embedded_text("held_out").documents)


def test_the_order_of_documents_does_not_depend_on_when_they_were_read():
    assert embedded_text("train").sha256 == embedded_text("train").sha256
    assert calibration_documents() == calibration_documents()
    one_by_one = [document for package in RUN_PACKAGES for document in embedded_text("train", (package,)).documents]
    assert tuple(one_by_one) == embedded_text("train").documents


def test_an_unknown_split_or_package_is_refused_by_name():
    with pytest.raises(ValueError, match="'test'"):
        embedded_text("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="requests"):
        embedded_text("train", ("requests",))


# --- model


def test_the_model_is_a_small_bf16_llama_with_grouped_query_attention():
    config = model().config
    weights = sum(parameter.numel() for parameter in model().parameters())
    assert config.model_type == "llama"
    assert 1 < config.num_attention_heads / config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings == 512
    assert 2_000_000 <= weights <= 8_000_000
    assert {parameter.dtype for parameter in model().parameters()} == {torch.bfloat16}


def test_the_model_folder_is_at_most_sixteen_megabytes():
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 16_000_000


@pytest.mark.parametrize("text", ["def f(x):\n    return x  # twice\n", "  äß→ 🙂 tab\t end ", "```\nBOS\n```", ""])
def test_the_tokenizer_returns_any_text_unchanged(text: str):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    assert 2048 <= len(tokenizer) <= 4096
    assert len(tokenizer) == model().config.vocab_size
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == model().config.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_model_has_learned_its_language():
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    document = perplexity_documents().documents[0]
    ids = torch.tensor([tokenizer(document).input_ids[:512]])
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        losses = [model()(input_ids=each, labels=each, use_cache=False).loss.item() for each in (ids, shuffled)]
    assert losses[0] < losses[1] - 1.0


# --- zero-shot task


def test_an_item_offers_four_different_choices_of_one_length_from_four_documents():
    assert len(continuation_items()) >= 500
    for item in continuation_items():
        assert len(set(item.choices)) == 4
        assert len(set(item.documents)) == 4
        assert {len(choice) for choice in item.choices} == {CONTINUATION}
        assert all(choice[0] == " " and choice[1].isalpha() for choice in item.choices)
        assert 160 <= len(item.context) <= LONGEST_CONTEXT
        assert not item.context[-1].isspace()


def test_the_right_choice_continues_the_context_and_no_other_does():
    documents = embedded_text("held_out").documents
    held_out = "\0".join(documents)
    for item in continuation_items():
        right = item.choices[item.answer]
        assert item.context + right in documents[item.documents[item.answer]]
        assert not any(item.context + choice in held_out for choice in item.choices if choice != right)


def test_a_scorer_blind_to_the_context_cannot_profit_from_the_places_or_the_choices():
    places = Counter(item.answer for item in continuation_items())
    assert len(places) == 4
    assert max(places.values()) - min(places.values()) <= 1
    right = {item.choices[item.answer] for item in continuation_items()}
    assert all(set(item.choices) <= right for item in continuation_items())


def test_items_do_not_overlap():
    passages = [item.context + item.choices[item.answer] for item in continuation_items()]
    assert len(set(passages)) == len(passages)
    held_out = embedded_text("held_out").documents
    ends: dict[int, list[tuple[int, int]]] = {}
    for item, passage in zip(continuation_items(), passages, strict=True):
        document = item.documents[item.answer]
        start = held_out[document].index(passage)
        ends.setdefault(document, []).append((start, start + len(passage)))
    for spans in ends.values():
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_the_items_are_the_same_in_every_call():
    assert continuation_items.__wrapped__() == continuation_items()


def test_the_items_are_the_first_in_hash_order_that_are_found_once_and_few_of_a_document():
    """Literally: all candidates are judged, then each document's first ones are taken, then the first of these."""
    held_out, kept = embedded_text("held_out").documents, []
    training, whole = "\0".join(embedded_text("train").documents), "\0".join(held_out)
    for number, document in enumerate(held_out):
        found = [p for p in _passages(document, number) if p.continuation not in training]
        found = [p for p in found if whole.count(p.continuation) == 1]
        kept += sorted(found, key=_digest)[:ITEMS_PER_DOCUMENT]
    chosen = sorted(kept, key=_digest)[:ITEMS]
    assert max(Counter(passage.document for passage in chosen).values()) == ITEMS_PER_DOCUMENT
    assert [item.context for item in continuation_items()] == [passage.context for passage in chosen]


def test_lm_eval_finds_the_task_and_reads_its_items():
    """Beside all of lm-eval's own tasks, which it takes long to read, its command finds it in test_run.py."""
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=str(TASKS_DIR), include_defaults=False).load([TASK_NAME])
    task: Any = loaded["tasks"][TASK_NAME]
    documents = list(task.test_docs())
    assert documents == list(task_dataset()["test"])
    assert task.doc_to_text(documents[0]) == continuation_items()[0].context
    assert task.doc_to_choice(documents[0]) == list(continuation_items()[0].choices)
    assert task.doc_to_target(documents[0]) == continuation_items()[0].answer
    assert {"acc", "acc_norm"} <= set(task.aggregation())
