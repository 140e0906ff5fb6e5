"""Classification tasks as text: a prompt, the words that may follow it, and which of them is right.

Prompts and words are those of MeZO (Malladi et al., arXiv 2305.17333, in `large_models/templates.py` of its code). Rows
are those of the task's training file: learned, held-out and tested examples are disjoint parts of it, drawn by the
seed, so that its validation file is untouched, and can be scored besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from besa_exp.errors import ConfigurationError, Unavailable, did_you_mean
from besa_exp.texts.files import format_of, rows
from besa_exp.texts.sources import TASK_FILES, fetched
from besa_exp.texts.tokens import Tokenizer, begins_with_bos, encode

Options = Int[Tensor, "_example option seq"]
"""Each option after its prompt, the right one first. The tokens of the option itself, on which it is judged, stand as
their complements ~id < 0; zeros fill a row up, and a causal model sees none of them before."""


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """`prompt` of a row, and what may follow: its `words`, as many as `count`, in the order of the label, which stands
    under one of `labels`."""

    prompt: Callable[[Row], str]
    words: Callable[[Row], tuple[str, ...]]
    count: int = 2
    labels: tuple[str, ...] = ("label",)


class Example(NamedTuple):
    """A row of a task as text; `words[label]` is right."""

    prompt: str
    words: tuple[str, ...]
    label: int


def _no_or_yes(row: Row) -> tuple[str, ...]:
    return "No", "Yes"


def _boolq(row: Row) -> str:
    question = row["question"].removesuffix("?")
    return f"{row['passage']} {question[:1].upper()}{question[1:]}?"


def _copa(row: Row) -> str:
    return row["premise"].rstrip().removesuffix(".") + {"effect": " so", "cause": " because"}[row["question"]]


def _copa_choices(row: Row) -> tuple[str, ...]:
    """What follows, as the middle of a sentence."""
    firsts = [row[key].split(" ") for key in ("choice1", "choice2")]
    return tuple(" " + " ".join([first if first == "I" else first.lower(), *rest]) for first, *rest in firsts)


TASKS = {
    "sst2": Task(lambda row: f"{row['sentence'].strip()} It was", lambda row: (" terrible", " great")),
    "rte": Task(
        lambda row: f'{row["sentence1"]}\nDoes this mean that "{row["sentence2"]}" is true? Yes or No?\n',
        lambda row: ("Yes", "No"),
    ),
    "cb": Task(
        lambda row: f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?\n',
        lambda row: ("Yes", "No", "Maybe"),
        count=3,
    ),
    "boolq": Task(_boolq, lambda row: (" No", " Yes"), labels=("label", "answer")),
    "wic": Task(
        lambda row: (
            f'Does the word "{row["word"]}" have the same meaning in these two sentences? Yes, No?\n'
            f"{row['sentence1']}\n{row['sentence2']}\n"
        ),
        _no_or_yes,
    ),
    "wsc": Task(
        lambda row: (
            f'{row["text"]}\nIn the previous sentence, does the pronoun "{row["span2_text"].lower()}" refer to '
            f"{row['span1_text']}? Yes or No?\n"
        ),
        _no_or_yes,
    ),
    "multirc": Task(
        lambda row: (
            f"{row['paragraph']}\nQuestion: {row['question']}\n"
            f'I found this answer "{row["answer"]}". Is that correct? Yes or No?\n'
        ),
        _no_or_yes,
    ),
    "copa": Task(_copa, _copa_choices),
}


@dataclass(frozen=True)
class Examples:
    """The parts of a task that are learned from, that choose the best state, and that are scored."""

    learned: Options
    held_out: Options
    tested: Options


def check_task(name: str, path: str | None) -> list[str]:
    """What is wrong with a task of this name, and with the file of its rows where one is given, in complete
    sentences."""
    if name not in TASKS:
        return [f"recovery.task={name}: must be one of {', '.join(TASKS)}{did_you_mean(name, TASKS)}"]
    if path is None:
        return []
    file = Path(path).expanduser()
    if not file.is_file() or format_of(file.name) not in ("lines", "parquet"):
        return [f"recovery.path={path}: must be a file of {name}'s rows, .jsonl or .parquet, that is there"]
    try:
        next(_read(name, file), None)
    except ConfigurationError as error:
        return list(error.problems)
    return []


def read_examples(
    name: str,
    path: str | None,
    tokenizer: Tokenizer | None,
    seq_len: int,
    sizes: tuple[int, int, int],
    seed: int,
    offline: bool,
) -> Examples:
    """The parts of a task: `sizes` are the examples of each label to learn from (fewer where there are no more), and
    those of the other two parts. Rows come from the hub's training file where `path` is None. A prompt that is too long
    for `seq_len` loses its beginning, but for BOS where the tokenizer puts it there.

    ConfigurationError: rows cannot be read, or are too few."""
    if tokenizer is None:
        raise ConfigurationError("recovery.task: the model has no tokenizer; put its files into the model folder")
    try:
        file = Path(path).expanduser() if path else fetched(TASK_FILES[name], name, offline)
    except Unavailable as error:
        raise ConfigurationError(f"recovery on {error}; recovery.path=FILE names a local file of its rows") from error
    found, count = list(_read(name, file)), TASKS[name].count
    parts = _drawn(file, [example.label for example in found], count, sizes, seed)
    return Examples(*(_encoded([found[place] for place in part], count, tokenizer, seq_len) for part in parts))


def _drawn(
    file: Path, labels: Sequence[int], count: int, sizes: tuple[int, int, int], seed: int
) -> tuple[list[int], ...]:
    """Places of the three parts. ConfigurationError: there are too few."""
    shots, held_out, tested = sizes
    order: list[int] = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    rest = order[held_out + tested :]
    learned = [[place for place in rest if labels[place] == label][:shots] for label in range(count)]
    if not all(learned):
        raise ConfigurationError(
            f"{file}: {len(labels)} examples are too few for {held_out} held out, {tested} tested and one of each "
            "label to learn from; give more, or smaller recovery.held_out and recovery.tested"
        )
    return [place for part in learned for place in part], order[:held_out], order[held_out : held_out + tested]


def _read(name: str, file: Path) -> Iterator[Example]:
    """Each row as text. ConfigurationError: a row lacks something."""
    task = TASKS[name]
    for number, row in rows(file):
        try:
            label = int(next(row[key] for key in task.labels if row.get(key) is not None))
            if not 0 <= label < task.count:
                raise ValueError(f"its label is {label}")
            yield Example(task.prompt(row), task.words(row), label)
        except (KeyError, StopIteration, TypeError, ValueError, AttributeError) as error:
            wrong = f"has no {error}" if isinstance(error, KeyError) else str(error) or f"has no {task.labels[0]}"
            raise ConfigurationError(
                f"{file}, row {number}: is no row of {name} ({wrong}); give its training file as the hub has it"
            ) from error


def _encoded(examples: Sequence[Example], count: int, tokenizer: Tokenizer, seq_len: int) -> Options:
    options = torch.zeros(len(examples), count, seq_len, dtype=torch.int64)
    bos = int(begins_with_bos(tokenizer))
    for number, (prompt, words, label) in enumerate(examples):
        alone = encode(tokenizer, prompt.rstrip(" ")).tolist()
        for place, word in enumerate((words[label], *words[:label], *words[label + 1 :])):
            ids = encode(tokenizer, prompt + word)
            same = [one == other for one, other in zip(alone, ids.tolist(), strict=False)]
            begun = [*same, False].index(False)
            ids[begun:] = ~ids[begun:]
            kept = torch.cat([ids[:bos], ids[bos:][-(seq_len - bos) :]])
            options[number, place, : len(kept)] = kept
    return options
