"""Tasks as text: prompts as MeZO writes them, the right option first, and parts that do not overlap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from letters import Letters

from besa_exp.errors import ConfigurationError
from besa_exp.texts.sources import TASK_FILES
from besa_exp.texts.tasks import TASKS, check_task, read_examples

ROWS = {
    "sst2": {"sentence": "a fine film ", "label": 1},
    "rte": {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0},
    "boolq": {"passage": "Ice floats.", "question": "does ice sink", "answer": False},
    "cb": {"premise": "It may rain.", "hypothesis": "It rains.", "label": 2},
    "wic": {"word": "run", "sentence1": "A long run.", "sentence2": "They run.", "label": 0},
    "wsc": {"text": "The cat saw the dog; It fled.", "span1_text": "The cat", "span2_text": "It", "label": 0},
    "multirc": {"paragraph": "Ice floats.", "question": "What does ice do?", "answer": "Float", "label": 1},
    "copa": {
        "premise": "The cup broke. ",
        "choice1": "I dropped it.",
        "choice2": "It was red.",
        "question": "cause",
        "label": 0,
    },
}
SAID = {
    "sst2": ["a fine film It was| great", "a fine film It was| terrible"],
    "rte": [f'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n|{word}' for word in ("Yes", "No")],
    "boolq": ["Ice floats. Does ice sink?| No", "Ice floats. Does ice sink?| Yes"],
    "cb": [
        f'Suppose It may rain. Can we infer that "It rains."? Yes, No, or Maybe?\n|{word}'
        for word in ("Maybe", "Yes", "No")
    ],
    "wic": [
        'Does the word "run" have the same meaning in these two sentences? Yes, No?\nA long run.\nThey run.\n|' + word
        for word in ("No", "Yes")
    ],
    "wsc": [
        "The cat saw the dog; It fled.\nIn the previous sentence, does the pronoun "
        f'"it" refer to The cat? Yes or No?\n|{word}'
        for word in ("No", "Yes")
    ],
    "multirc": [
        f'Ice floats.\nQuestion: What does ice do?\nI found this answer "Float". Is that correct? Yes or No?\n|{word}'
        for word in ("Yes", "No")
    ],
    "copa": ["The cup broke because| I dropped it.", "The cup broke because| it was red."],
}


def written(folder: Path, rows: list[dict]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(options: torch.Tensor) -> list[str]:
    """The text of each option, a bar before the tokens it is judged by."""
    texts = []
    for row in options.tolist():
        shown = [chr(~token if token < 0 else token) for token in row[1:] if token != 0]
        begun = next(place for place, token in enumerate(row[1:]) if token < 0)
        texts.append("".join(shown[:begun]) + "|" + "".join(shown[begun:]))
    return texts


def test_every_task_has_a_file_of_the_hub() -> None:
    assert {*TASKS} == {*TASK_FILES} == {*ROWS}


@pytest.mark.parametrize("name", ROWS)
def test_prompts_and_words_are_those_of_the_paper_and_the_right_one_is_first(tmp_path: Path, name: str) -> None:
    row, (key, first) = ROWS[name], ("answer" if name == "boolq" else "label", next(iter(ROWS[name])))
    others = [row | {first: "other", key: label} for label in range(TASKS[name].count) if label != row[key]]
    found = read_examples(name, written(tmp_path, [row, *others] * 4), Letters(), 150, (1, 1, 1), 1, True)
    examples = [said(example) for part in vars(found).values() for example in part]
    assert next(options for options in examples if "other" not in options[0]) == SAID[name]
    assert {len(options) for options in examples} == {TASKS[name].count}
    assert (found.learned[:, :, 0] == Letters.bos_token_id).all()


def test_parts_are_disjoint_drawn_by_the_seed_and_have_shots_of_each_label(tmp_path: Path) -> None:
    rows = [{"sentence": f"film {number}", "label": int(number % 4 == 0)} for number in range(60)]

    def drawn(seed: int) -> list[list[str]]:
        found = read_examples("sst2", written(tmp_path, rows), Letters(), 99, (5, 7, 11), seed, True)
        return [[said(example)[0] for example in part] for part in vars(found).values()]

    learned, held_out, tested = drawn(3)
    assert (len(held_out), len(tested)) == (7, 11)
    assert sorted(text.endswith("great") for text in learned) == [False] * 5 + [True] * 5
    assert len({*learned, *held_out, *tested}) == 28
    assert drawn(3) == [learned, held_out, tested]
    assert drawn(4)[1] != held_out


def test_a_long_prompt_loses_its_beginning_and_keeps_bos_and_the_option(tmp_path: Path) -> None:
    rows = [{"sentence": "x" * 50 + "end", "label": number % 2} for number in range(9)]
    found = read_examples("sst2", written(tmp_path, rows), Letters(), 20, (1, 1, 1), 0, True)
    texts = {text for example in found.learned for text in said(example)}
    assert texts == {"end It was| terrible"[-20:], "xxxend It was| great"}
    assert (found.learned[:, :, 0] == Letters.bos_token_id).all()


def test_a_long_prompt_keeps_no_first_token_where_the_tokenizer_puts_no_bos_before_it(tmp_path: Path) -> None:
    class Plain(Letters):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [*map(ord, text)]}

    rows = [{"sentence": "A" + "x" * 50, "label": number % 2} for number in range(9)]
    found = read_examples("sst2", written(tmp_path, rows), Plain(), 20, (1, 1, 1), 0, True)
    first = {chr(int(token)) for token in found.learned[:, :, 0].flatten()}
    assert first == {"x"}


def test_what_is_no_row_of_the_task_is_refused_with_its_place(tmp_path: Path) -> None:
    assert "did you mean boolq" in check_task("bolq", None)[0]
    assert "must be a file" in check_task("rte", str(tmp_path / "none.jsonl"))[0]
    assert "no row of rte (has no label)" in check_task("rte", written(tmp_path, [ROWS["sst2"] | {"label": None}]))[0]
    assert "has no 'sentence1'" in check_task("rte", written(tmp_path, [ROWS["sst2"]]))[0]
    assert "has no 'reason'" in check_task("copa", written(tmp_path, [ROWS["copa"] | {"question": "reason"}]))[0]
    assert check_task("sst2", written(tmp_path, [ROWS["sst2"]])) == []
    for rows, why in (([ROWS["sst2"] | {"label": 2}], "row 1: .*its label is 2"), ([ROWS["sst2"]] * 3, "too few")):
        path = written(tmp_path, rows)
        with pytest.raises(ConfigurationError, match=why):
            read_examples("sst2", path, Letters(), 20, (1, 1, 1), 0, True)
