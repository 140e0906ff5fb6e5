"""Whether a task's questions can be answered right at all, known before a model is asked.

lm-eval scores an answer that is none of the choices as wrong, and a null as the word None; either gives a number that
says nothing of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from lm_eval.api.task import ConfigurableTask

from besa_exp.errors import Unavailable, first_line

SHOWN = 120  # characters of a value in a message
logger = logging.getLogger(__name__)


class _Null:
    """Stands in the place of a null while a question is written, so that a text which shows it is noticed; a template
    that asks whether there is a value hears no."""

    mark = "\N{REPLACEMENT CHARACTER}null\N{REPLACEMENT CHARACTER}"

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.mark

    __repr__ = __str__


def check_questions(task: Any, source: tuple[str, Sequence[int]] | None, limit: int | None, strict: bool) -> int:
    """How many of the questions that are scored have no answer; `source` is the file and the lines they come from.

    Unavailable with the first one where `strict`, and where there is no question at all; else a warning."""
    documents = task.eval_docs
    if len(documents) == 0:
        raise Unavailable(f"{source[0] if source else task.task_name} holds no questions")
    if type(task) is not ConfigurableTask:  # made by code, which does as it likes
        return 0
    lines = source[1] if source and len(source[1]) == len(documents) else None
    found = 0
    for number, document in enumerate(islice(documents, None if strict else limit)):
        problem = question_problem(task, document)
        if problem is None:
            continue
        place = f"{source[0]}, line {lines[number]}" if source and lines else f"question {number + 1}"
        if strict:
            raise Unavailable(f"{place}: {problem}")
        if not found:
            logger.warning("%s, %s: %s; it counts as wrong, and so may others", task.task_name, place, problem)
        found += 1
    return found


def question_problem(task: Any, document: Mapping[str, Any]) -> str | None:
    """Why a question can have no right answer, or shows a null; None: it can be asked."""
    nulls = [name for name, value in document.items() if value is None]
    filled = {name: _Null() if value is None else value for name, value in document.items()}
    try:
        text = task.doc_to_text(filled)
        choices = None if task.config.doc_to_choice is None else task.doc_to_choice(filled)
        target = None if callable(task.config.process_results) else task.doc_to_target(filled)
    except Exception as error:  # noqa: BLE001 - of templates and of the functions of a task
        because = f" (null: {', '.join(nulls)})" if nulls else ""
        return f"the task cannot use it: {first_line(error)}{because}"
    if nulls and any(_Null.mark in str(part) for part in (text, choices, target)):
        return f"null under {', '.join(nulls)}, which the task shows"
    if callable(task.config.process_results):
        return None  # what is right is decided there
    return _answer_problem(task, text, choices, target)


def _answer_problem(task: Any, text: Any, choices: Any, target: Any) -> str | None:
    if task.OUTPUT_TYPE == "multiple_choice":
        if not isinstance(choices, list) or len(choices) < 2:
            return f"its choices are {_shown(choices)}, and there must be two or more"
        if not all(isinstance(choice, str) and choice for choice in choices):
            return f"its choices are {_shown(choices)}, and each must be a text that is not empty"
        gold = text if task.multiple_input else target
        right = gold if isinstance(gold, list) else [gold]
        named = () if isinstance(gold, list) else choices  # lm-eval looks up a text alone, and none of a list
        if right and all(_is_index(answer, choices) or answer in named for answer in right):
            return None
        return (
            f"its answer is {_shown(gold)}, which is none of its choices {_shown(choices)}: a number from 0 to "
            f"{len(choices) - 1} or one of the texts"
        )
    if task.OUTPUT_TYPE in ("loglikelihood", "loglikelihood_rolling") and not (isinstance(target, str) and target):
        return f"the text to be scored is {_shown(target)}"
    if task.OUTPUT_TYPE == "generate_until" and choices is not None:
        return None if _is_index(target, choices) else f"its answer is {_shown(target)}, no number of a choice"
    return "it has no answer" if target in (None, "", []) else None


def _is_index(answer: Any, choices: Sequence[str]) -> bool:
    return isinstance(answer, int | float) and float(answer).is_integer() and 0 <= answer < len(choices)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
