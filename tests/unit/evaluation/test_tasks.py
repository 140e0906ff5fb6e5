"""Any task: lm-eval's and one's own definitions, groups and tags, what they are scored on, and what has no score."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import byte_tokenizer, tiny_llama

from besa_exp.checkpoints.load import LoadedModel
from besa_exp.evaluation.checks import check_evaluator
from besa_exp.evaluation.score import Scores
from besa_exp.evaluation.scores import evaluate
from besa_exp.evaluation.task_definitions import find, needed, read_definitions, scored_names, tasks_root
from besa_exp.settings import EvaluatorSettings

CONTEXT = 256
COMMON = "dataset_path: somewhere/else\ntest_split: test\ntraining_split: train\nmetadata: {version: 3.0}\n"
METRICS = "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
DEFINITIONS = {  # one of each kind that lm-eval has
    "choosing": "tag: [mine]\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
    f"doc_to_choice: choices\n{METRICS}",
    "continuing": "tag: [mine]\noutput_type: loglikelihood\ndoc_to_text: '{{question}}'\n"
    "doc_to_target: ' {{choices[0]}}'\n"
    "metric_list:\n  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
    "  - {metric: acc, aggregation: mean, higher_is_better: true}\n",
    "reading": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
    "metric_list:\n  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}\n",
    "writing": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[0]}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 6, do_sample: false}\nnum_fewshot: 2\n"
    "process_results: !function written.letters\n"
    "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n",
    "other": "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: answer\n"
    f"doc_to_choice: choices\n{METRICS}",
}
LETTERS = """
def letters(document, answers):  # of every answer, weighed by its question
    return {"exact_match": float(sum(map(ord, answers[0])) * len(document["question"]))}
"""
GROUP = "group: ours\ntask: [choosing, other]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"


def question(number: int) -> dict[str, Any]:
    choices = ["a red fox", "the sea", "a spoon"]
    return {"question": f"What is box {number}, {'z' * (number % 3)} then", "choices": choices, "answer": number % 3}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(CONTEXT)


@pytest.fixture
def own(tmp_path) -> Path:
    """Definitions of each kind, with a mirror of their questions: 9 each, 6 of `other`."""
    for name, text in DEFINITIONS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{COMMON}{text}")
        write(tmp_path, name, [question(number) for number in range(6 if name == "other" else 9)])
    (tmp_path / "group.yaml").write_text(GROUP)
    (tmp_path / "written.py").write_text(LETTERS)
    return tmp_path


def write(folder: Path, task: str, rows: list[Any]) -> Path:
    (folder / task).mkdir(exist_ok=True)
    (folder / task / "train.jsonl").write_text("".join(json.dumps(question(number)) + "\n" for number in range(20, 25)))
    path = folder / task / "test.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def settings(*tasks: str, own: Path | None = None, **changes) -> EvaluatorSettings:
    folder = None if own is None else str(own)
    return replace(
        EvaluatorSettings("test", tasks=tasks, include_path=folder, data_dir=folder, batch_size=4), **changes
    )


def score(model, given: EvaluatorSettings) -> Scores:
    return evaluate(LoadedModel(model, byte_tokenizer(), None, Path()), given, True, 0, lambda _: None)


# What is scored


def test_every_kind_of_task_has_the_score_that_lm_evals_own_simple_evaluate_gives(model, own, monkeypatch):
    import lm_eval.tasks
    from lm_eval.models.huggingface import HFLM

    from besa_exp.evaluation.task_loading import load_task
    from besa_exp.evaluation.zero_shot import quiet

    simple_evaluate: Any = lm_eval.simple_evaluate  # a decorator hides the signatures of both from a type checker
    hflm: Any = HFLM
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it starts pip and compilers
    names = ["choosing", "continuing", "reading", "writing"]
    given = settings(*names, own=own)
    with quiet(), torch.random.fork_rng():
        theirs = simple_evaluate(
            hflm(pretrained=model, tokenizer=byte_tokenizer(), batch_size=3, max_length=CONTEXT),
            tasks=[load_task(name, given, True).tasks[name] for name in names],
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
            fewshot_random_seed=0,
            bootstrap_iters=0,
        )["results"]
    for batch_size in (4, "auto"):
        ours = score(model, replace(given, batch_size=batch_size))
        assert not ours.unavailable
        for name in names:
            found = {key: value for key, value in ours.zero_shot[name].items() if "stderr" not in key}
            assert found == pytest.approx({key: theirs[name][key] for key in found}, rel=1e-4)
            assert any(found.values())


def test_direction_questions_shots_and_version_stand_beside_each_score(model, own):
    scores = score(model, settings("continuing", "writing", own=own, limit=4))
    record = scores.provenance["zero_shot"]["tasks"]
    assert record["continuing"]["higher_is_better"] == {"perplexity": False, "acc": True}
    assert (record["continuing"]["documents"], record["continuing"]["questions"]) == (4, 9)
    assert [record[name]["num_fewshot"] for name in ("continuing", "writing")] == [0, 2]
    assert record["writing"]["version"] == 3.0
    asked = score(model, settings("writing", own=own, limit=2, num_fewshot=1))
    assert asked.provenance["zero_shot"]["tasks"]["writing"]["num_fewshot"] == 1
    assert "acc_stderr,none" in scores.zero_shot["continuing"]


def test_a_group_is_scored_as_a_whole_and_a_tag_by_its_tasks(model, own):
    scores = score(model, settings("ours", "mine", own=own))
    assert scores.zero_shot.keys() == {"ours", "choosing", "continuing"}
    record = scores.provenance["zero_shot"]["tasks"]["ours"]
    parts = record["subtasks"]
    assert (record["documents"], parts["choosing"]["documents"], parts["other"]["documents"]) == (15, 9, 6)
    expected = (9 * parts["choosing"]["acc,none"] + 6 * parts["other"]["acc,none"]) / 15
    assert scores.zero_shot["ours"]["acc,none"] == pytest.approx(expected)
    assert parts["choosing"]["acc,none"] == scores.zero_shot["choosing"]["acc,none"]
    assert record["data"].startswith("2 sources sha256:")


def test_a_split_may_be_stored_in_any_form_that_is_read_but_in_one_alone(model, own):
    import pyarrow
    import pyarrow.parquet

    expected = score(model, settings("choosing", own=own)).zero_shot["choosing"]
    path = own / "choosing" / "test.jsonl"
    table = pyarrow.Table.from_pylist([question(number) for number in range(9)])
    pyarrow.parquet.write_table(table, path.with_suffix(".parquet"))
    both = score(model, settings("choosing", own=own))
    assert "test.jsonl and test.parquet" in both.unavailable["choosing"]
    path.unlink()
    assert score(model, settings("choosing", own=own)).zero_shot["choosing"] == expected


# What has no score


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_kind_of_task_has_a_score_where_a_logit_is_not_finite(own, value):
    broken = tiny_llama(CONTEXT)
    with torch.no_grad():
        broken.lm_head.weight[7] = value  # one token of the vocabulary, which no question holds
    scores = score(broken, settings("choosing", "continuing", "reading", "writing", own=own, num_fewshot=0))
    assert not scores.zero_shot
    assert all("logits are not finite" in reason for reason in scores.unavailable.values())
    assert len(scores.unavailable) == 4


def test_a_model_that_breaks_on_one_question_has_no_score_on_its_task(own):
    broken = tiny_llama(CONTEXT)
    with torch.no_grad():
        broken.model.embed_tokens.weight[byte_tokenizer().convert_tokens_to_ids("q")] = math.nan
    write(own, "other", [*map(question, range(5)), question(5) | {"question": "q"}])
    scores = score(broken, settings("choosing", "other", own=own))
    assert scores.zero_shot.keys() == {"choosing"}
    assert "logits are not finite" in scores.unavailable["other"]


UNUSABLE = {  # what is wrong with the third row: (the row, what the reason says)
    "text for a number": (question(2) | {"answer": "2"}, "'answer' is str, not int as in line 1"),
    "beyond the choices": (question(2) | {"answer": 3}, "its answer is 3, which is none of its choices"),
    "hidden": (question(2) | {"answer": -1}, "its answer is -1"),
    "null answer": (question(2) | {"answer": None}, "null under answer"),
    "null text": (question(2) | {"question": None}, "null under question"),
    "no text": ({"choices": ["a", "b"], "answer": 0}, "null under question"),
    "an empty choice": (question(2) | {"choices": ["a", "", "b"]}, "not empty"),
    "one choice": (question(0) | {"choices": ["a"]}, "two or more"),
    "half a surrogate pair": ('{"question": "a\\ud83d"}\n', "surrogate"),
    "no JSON": ('{"question": \n', "must be an object of JSON"),
    "an array": ("[1]\n", "jq -c"),
}


@pytest.mark.parametrize("wrong", UNUSABLE)
def test_a_row_that_cannot_be_scored_is_named_with_its_line_and_costs_no_other_task(model, own, wrong):
    row, reason = UNUSABLE[wrong]
    path = write(own, "choosing", [question(0), question(1), row, question(3)])
    scores = score(model, settings("choosing", "other", own=own, limit=2))
    assert scores.zero_shot.keys() == {"other"}
    assert f"{path}, line 3" in scores.unavailable["choosing"]
    assert reason in scores.unavailable["choosing"]


def test_labels_that_are_all_text_are_found(model, own):
    path = write(own, "choosing", [question(number) | {"answer": str(number % 3)} for number in range(9)])
    reason = score(model, settings("choosing", own=own)).unavailable["choosing"]
    assert reason.startswith(f"{path}, line 1: its answer is '0', which is none of its choices ['a red fox'")


def test_answers_given_as_the_text_of_a_choice_are_right_ones(model, own):
    expected = score(model, settings("choosing", own=own)).zero_shot["choosing"]
    rows = [question(number) for number in range(9)]
    write(own, "choosing", [row | {"answer": row["choices"][row["answer"]]} for row in rows])
    assert score(model, settings("choosing", own=own)).zero_shot["choosing"] == expected


def test_an_empty_split_holds_no_questions(model, own):
    path = write(own, "choosing", [])
    assert score(model, settings("choosing", own=own)).unavailable == {"choosing": f"{path} holds no questions"}


def test_whatever_a_task_throws_is_its_reason_with_the_place_and_the_others_are_scored(model, own):
    (own / "code.py").write_text("def results(document, answers):\n    return {'acc': document['gone']}\n")
    with (own / "choosing.yaml").open("a") as file:
        file.write("process_results: !function code.results\n")
    scores = score(model, settings("choosing", "other", own=own))
    assert scores.zero_shot.keys() == {"other"}
    assert scores.unavailable["choosing"] == "KeyError: 'gone' (code.py, line 2)"


def test_an_answer_longer_than_the_context_makes_the_task_unavailable(own):
    scores = score(tiny_llama(6), settings("writing", own=own, num_fewshot=0))
    assert "its answers may have 6 tokens; the model's context is 6" in scores.unavailable["writing"]


# What there is


@pytest.mark.parametrize("folder", ["glue", "lambada", "mmlu/default", "arc", "super_glue", "gsm8k", "squadv2"])
def test_names_kinds_files_and_tags_are_those_of_lm_evals_own_index(folder):
    from lm_eval.tasks._index import TaskIndex

    root = tasks_root()
    assert root is not None
    theirs = TaskIndex.build([root / folder])
    ours = read_definitions(root / folder)
    kinds = {"TASK": "task", "PY_TASK": "task", "GROUP": "group", "TAG": "tag"}
    assert {name: (found.kind, found.path) for name, found in ours.items()} == {
        name: (kinds[entry.kind.name], entry.yaml_path) for name, entry in theirs.items()
    }
    tags = {name: tuple(sorted(entry.tags)) for name, entry in theirs.items() if entry.kind.name == "TAG"}
    assert {name: found.members for name, found in ours.items() if found.kind == "tag"} == tags


def test_ones_own_definition_comes_before_lm_evals(own):
    (own / "piqa.yaml").write_text(f"task: piqa\n{COMMON}{DEFINITIONS['other']}")
    found = find("piqa", str(own))
    assert found is not None
    assert found.path == own / "piqa.yaml"


def test_names_that_lm_eval_has_are_found_and_others_get_their_nearest(own):
    names = ("rte", "lambada_openai", "mmlu", "ai2_arc", "gsm8k", "piqa")
    assert check_evaluator(settings(*names), None) == []
    assert list(scored_names(settings("ai2_arc", "mmlu", "arc_easy"))) == ["arc_challenge", "arc_easy", "mmlu"]
    assert sum(part.kind == "task" for part in needed("mmlu")) == 57
    problems = check_evaluator(settings("arc", "lambada_opena", "choosin", own=own), None)
    for problem, words in zip(problems, ("arc_easy or arc_challenge", "lambada_openai", "choosing"), strict=True):
        assert words in problem
        assert "lm_eval ls tasks" in problem


def test_lm_evals_tasks_are_scored_from_a_local_mirror(model, tmp_path):
    mirror = {
        "rte": ("validation", {"sentence1": "It is.", "sentence2": "Is it?", "label": 0}),
        "lambada_openai": ("test", {"text": "It was a box."}),
        "mmlu_astronomy": ("test", {"question": "Box?", "choices": ["a", "b", "c", "d"], "answer": 2}),
        "gsm8k": ("test", {"question": "Two boxes?", "answer": "#### 2"}),
    }
    for task, (split, row) in mirror.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(2)))
    given = settings(*mirror, data_dir=str(tmp_path))
    scores = score(tiny_llama(1024), given)
    assert scores.unavailable.keys() == {"gsm8k"}
    assert str(tmp_path / "gsm8k" / "train.jsonl") in scores.unavailable["gsm8k"]  # it shows five by itself
    assert scores.zero_shot["lambada_openai"].keys() > {"perplexity,none", "acc,none"}
    asked = score(tiny_llama(1024), replace(given, tasks=("gsm8k",), num_fewshot=0))
    assert "exact_match,strict-match" in asked.zero_shot["gsm8k"]


def test_a_folder_that_defines_no_task_is_told_with_the_reason(tmp_path):
    (tmp_path / "a.yaml").write_text("task: [")
    problems = check_evaluator(settings("piqa", own=tmp_path), None)
    assert len(problems) == 1
    assert "defines no task" in problems[0]
    assert "a.yaml: while parsing" in problems[0]
    (gone,) = check_evaluator(settings("piqa", include_path=str(tmp_path / "gone")), None)
    assert "there is no such folder" in gone
