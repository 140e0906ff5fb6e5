"""The embedded zero-shot task: which of four passages continues the context?

Items are cut from the held-out documents of the packages a run reads. Every continuation starts with a space before a
letter and has CONTINUATION characters. The three wrong choices of an item are the right ones of items from three other
documents, so a scorer that ignores the context is right one time in four. Nothing is drawn at random: order and
distractors follow from hashes of the text, the right choice takes the four places in turn.

lm-eval reads the task from tasks/embedded_continuations.yaml, which names `task_dataset`.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

from besa_exp.texts.embedded.text import embedded_text

CONTEXT = 160  # characters at least; it starts and ends with a whole word
LONGEST_CONTEXT = 240
CONTINUATION = 56  # characters, all choices alike
ITEMS = 512
ITEMS_PER_DOCUMENT = 20  # so that no long module sets the topic
NUM_CHOICES = 4
LETTER_SHARE = 0.6  # of a continuation; less is a table or a rule
WORD_START = re.compile(r"(?<=\S) (?=[A-Za-z])")


@dataclass(frozen=True)
class Passage:
    """A context and what follows it in document number `document`."""

    document: int
    context: str
    continuation: str


@dataclass(frozen=True)
class Item:
    """A question: `choices[answer]` continues the context; `documents` says where each choice comes from."""

    context: str
    choices: tuple[str, ...]
    answer: int
    documents: tuple[int, ...]


@cache
def continuation_items() -> tuple[Item, ...]:
    """The ITEMS questions, the same in every call with the same package versions.

    Raises ValueError where the installed packages hold too little held-out text for them.
    """
    documents = embedded_text("held_out").documents
    training, held_out = "\0".join(embedded_text("train").documents), "\0".join(documents)
    candidates = [passage for number, document in enumerate(documents) for passage in _passages(document, number)]
    passages, of_document = [], Counter[int]()
    for passage in sorted(candidates, key=_digest):
        if len(passages) == ITEMS:
            break
        if of_document[passage.document] == ITEMS_PER_DOCUMENT:
            continue
        if passage.continuation not in training and held_out.count(passage.continuation) == 1:
            passages.append(passage)
            of_document[passage.document] += 1
    if len(passages) < ITEMS:
        raise ValueError(f"the installed packages give {len(passages)} held-out passages; the task needs {ITEMS}")
    return tuple(_item(passages, index) for index in range(ITEMS))


def task_dataset(**_metadata: object):
    """What lm-eval's `custom_dataset` expects: a DatasetDict with the split `test`; it passes the task's metadata."""
    from datasets import Dataset, DatasetDict  # slow to import, and only lm-eval needs it

    rows = [
        {"context": item.context, "choices": list(item.choices), "answer": item.answer} for item in continuation_items()
    ]
    return DatasetDict({"test": Dataset.from_list(rows)})


def _passages(document: str, number: int) -> list[Passage]:
    """Passages one after another, none overlapping, each context starting at a word."""
    passages, end = [], 0
    while (start := WORD_START.search(document, end)) and (cut := WORD_START.search(document, start.end() + CONTEXT)):
        end = cut.start() + CONTINUATION
        context, continuation = document[start.end() : cut.start()], document[cut.start() : end]
        letters = sum(character.isalpha() for character in continuation)
        fits = len(context) <= LONGEST_CONTEXT and len(continuation) == CONTINUATION
        if fits and letters >= LETTER_SHARE * CONTINUATION:
            passages.append(Passage(number, context, continuation))
    return passages


def _item(passages: list[Passage], index: int) -> Item:
    """Question number `index`: its passage, and the next ones in hash order that come from documents not yet chosen."""
    chosen = [passages[index]]
    for offset in range(1, len(passages)):
        other = passages[(index + offset) % len(passages)]
        if other.document not in {passage.document for passage in chosen}:
            chosen.append(other)
        if len(chosen) == NUM_CHOICES:
            break
    answer = index % NUM_CHOICES
    ordered = chosen[1 : answer + 1] + chosen[:1] + chosen[answer + 1 :]
    return Item(
        context=passages[index].context,
        choices=tuple(passage.continuation for passage in ordered),
        answer=answer,
        documents=tuple(passage.document for passage in ordered),
    )


def _digest(passage: Passage) -> bytes:
    return hashlib.sha256((passage.context + passage.continuation).encode()).digest()
