"""A task's score in a line: its metric, its standard error, and how many of its questions it is of."""

from __future__ import annotations

from typing import Any

from besa_exp.cli.jobs import summary_line
from besa_exp.evaluation.score import (
    Score,
    Scores,
    main_scores,
    metric_name,
    perplexity_score,
    set_names,
    task_scores,
)

RESULTS: dict[str, Any] = {
    "measured_sparsity": 0.5,
    "perplexity": {},
    "zero_shot": {
        "piqa": {"acc,none": 0.25, "acc_stderr,none": 0.1637, "acc_norm,none": 0.375, "acc_norm_stderr,none": 0.183},
        "gsm8k": {"exact_match_stderr,strict-match": 0.01, "exact_match,strict-match": 0.5},
    },
    "dense": {"zero_shot": {"piqa": {"acc_norm,none": 0.75}}},
    "provenance": {"zero_shot": {"tasks": {"piqa": {"documents": 8, "questions": 1838}, "gsm8k": {"documents": 9}}}},
}


def test_the_line_of_a_run_tells_error_and_questions_of_every_kind_of_task():
    assert summary_line(RESULTS) == (
        "50.00 % zeros, piqa acc_norm 0.3750 ± 0.1830 (8 of 1,838 questions, dense 0.7500), "
        "gsm8k exact_match (strict-match) 0.5000 ± 0.0100"
    )


def main_metric(metrics: dict[str, float]) -> list[str]:
    return [score.metric for score in main_scores(task_scores("task", metrics, {}))]


def test_a_task_is_told_by_acc_norm_or_acc_or_its_first_metric():
    assert main_metric({"acc,none": 1.0, "acc_norm,none": 0.5}) == ["acc_norm,none"]
    assert main_metric({"perplexity,none": 3.0, "acc,none": 1.0}) == ["acc,none"]
    assert main_metric({"bits_per_byte,none": 3.0}) == ["bits_per_byte,none"]
    assert main_metric({"acc_stderr,none": 0.1}) == []
    assert metric_name("exact_match,flexible-extract") == "exact_match (flexible-extract)"


def test_scores_are_flat_with_their_error_number_and_conditions():
    scores = Scores.from_dict(RESULTS)
    plain = {"questions": 1838, "documents": 8}
    assert scores.scores[0] == Score("zero_shot", "piqa", "acc,none", 0.25, 0.1637, 8, plain)
    assert scores.scores[-1] == Score("zero_shot", "gsm8k", "exact_match,strict-match", 0.5, 0.01, 9, {"documents": 9})
    assert [score.path for score in scores.scores][1:] == [
        "zero_shot/piqa/acc_norm,none",
        "zero_shot/gsm8k/exact_match,strict-match",
    ]


def test_results_are_the_same_after_they_were_read_and_written():
    results = {
        "perplexity": {"ptb": None, "c4": 7.5},
        "zero_shot": RESULTS["zero_shot"],
        "unavailable": {"ptb": "no network", "speed": "the device is cpu"},
        "speed": {"unavailable": "the device is cpu"},
        "provenance": {
            "perplexity": {"c4": {"num_tokens": 64, "seq_len": 32}},
            "zero_shot": {"lm_eval": "0.4.13", "limit": 8} | RESULTS["provenance"]["zero_shot"],
        },
    }
    scores = Scores.from_dict(results)
    assert {**scores.to_dict(), "provenance": scores.provenance} == results
    assert scores.scores[1].n == 64
    assert scores.conditions(scores.scores[2]) == {"lm_eval": "0.4.13", "limit": 8, "documents": 8, "questions": 1838}


def test_a_dense_models_scores_take_their_records_from_the_whole_results():
    (score,) = Scores.from_dict(RESULTS["dense"], RESULTS["provenance"]).scores
    assert (score.value, score.stderr, score.n) == (0.75, None, 8)


def test_files_of_one_name_are_named_with_the_folders_that_tell_them_apart() -> None:
    names = ("wikitext2", "/data/x/a/test.txt", "/data/y/a/test.txt", "b/test.txt", "/data/valid.txt")
    scores = [perplexity_score(name, 1.0, {}) for name in names]
    assert [*set_names(scores).values()] == ["wikitext2", "x/a/test.txt", "y/a/test.txt", "b/test.txt", "valid.txt"]
    assert set_names(task_scores("piqa", {"acc,none": 0.5}, {})) == {}
