"""A task's score in a line: its metric, its standard error, and how many of its questions it is of."""

from __future__ import annotations

from besa_exp.cli.jobs import summary_line
from besa_exp.evaluation.task_metrics import main_metric, metric_name

RESULTS = {
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


def test_a_task_is_told_by_acc_norm_or_acc_or_its_first_metric():
    assert main_metric({"acc,none": 1.0, "acc_norm,none": 0.5}) == "acc_norm,none"
    assert main_metric({"perplexity,none": 3.0, "acc,none": 1.0}) == "acc,none"
    assert main_metric({"bits_per_byte,none": 3.0}) == "bits_per_byte,none"
    assert main_metric({"acc_stderr,none": 0.1}) is None
    assert metric_name("exact_match,flexible-extract") == "exact_match (flexible-extract)"
