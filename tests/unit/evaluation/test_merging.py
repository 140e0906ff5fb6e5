"""Scores that join earlier ones: what is left, what is refused, and what is kept of a score that is replaced."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from besa_exp.evaluation.checks import PROMPTS
from besa_exp.evaluation.merging import merged, remaining
from besa_exp.evaluation.score import Scores
from besa_exp.settings import EvaluatorSettings

HEADER = {"lm_eval": "0.4.12", "batch_size": "auto", "limit": None, "seed": 0}
ACCURACY = {"acc,none": 0.5}
RESULTS = {
    "perplexity": {"wikitext2": 6.0, "ptb": None},
    "zero_shot": {"piqa": ACCURACY},
    "unavailable": {"ptb": "no network"},
    "provenance": {
        "perplexity": {"wikitext2": {"seq_len": 2048, "num_windows": 9, "tokens_sha256": "aa"}},
        "zero_shot": {**HEADER, "tasks": {"piqa": {"version": 1, "num_fewshot": 0}}},
    },
}
ASKED = EvaluatorSettings("test", perplexity_sets=("wikitext2", "ptb", "c4"), tasks=("piqa", "boolq"))


def scores_of(
    perplexity: dict[str, Any] | None = None,
    zero_shot: dict[str, Any] | None = None,
    unavailable: dict[str, str] | None = None,
    header: dict[str, Any] | None = None,
) -> Scores:
    """Scores with a record each."""
    records = {
        name: {"seq_len": 2048, "num_windows": 9, "tokens_sha256": "bb"}
        for name, value in (perplexity or {}).items()
        if value
    }
    tasks = {name: {"version": 2, "num_fewshot": 0} for name in zero_shot or {}}
    common = {**(header or HEADER), "tasks": tasks} if zero_shot else {}
    values = {"perplexity": perplexity, "zero_shot": zero_shot, "unavailable": unavailable}
    return Scores.from_dict(values | {"provenance": {"perplexity": records, "zero_shot": common}})


def test_what_is_scored_alike_is_left_out_and_what_was_not_to_be_had_is_tried_again() -> None:
    left = remaining(ASKED, 0, 4096, RESULTS)
    assert left.settings.perplexity_sets == ("ptb", "c4")
    assert left.settings.tasks == ("boolq",)
    assert left.conflicts == ()
    assert "scored with lm-eval 0.4.12" in left.known[1]


@pytest.mark.parametrize(
    ("changed", "seed", "told"),
    [
        ({"seq_len": 1024}, 0, "windows of 2048 tokens then, 1024 now"),
        ({"max_windows": 4}, 0, "all windows then, 4 now"),
        ({"limit": 8}, 0, "limit None then, 8 now"),
        ({"num_fewshot": 5}, 0, "num_fewshot 0 then, 5 now"),
    ],
)
def test_a_score_under_other_conditions_is_a_conflict(changed: dict[str, Any], seed: int, told: str) -> None:
    (conflict,) = remaining(replace(ASKED, **changed), seed, 4096, RESULTS).conflicts
    assert told in conflict
    assert "overwrite=true" in conflict


def test_the_default_window_is_that_of_the_models_context() -> None:
    assert remaining(ASKED, 0, 2048, RESULTS).conflicts == ()
    assert "512 now" in remaining(ASKED, 0, 512, RESULTS).conflicts[0]
    assert remaining(ASKED, 0, None, RESULTS).conflicts == ()


def test_a_file_that_has_changed_is_a_conflict(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("other")
    asked = replace(ASKED, perplexity_sets=(str(text),), tasks=())
    results = {"perplexity": {str(text): 3.0}, "provenance": {"perplexity": {str(text): {"file_sha256": "00"}}}}
    assert "the file has changed since" in remaining(asked, 0, None, results).conflicts[0]


def test_overwriting_scores_everything() -> None:
    assert remaining(ASKED, 0, 4096, RESULTS, overwrite=True).settings == ASKED


def test_new_scores_join_and_the_earlier_ones_are_untouched() -> None:
    before = copy.deepcopy(RESULTS)
    union, told = merged(RESULTS, scores_of({"ptb": 30.0, "c4": None}, {"boolq": ACCURACY}, {"c4": "no network"}))
    assert told == []
    assert before == RESULTS
    assert union["perplexity"] == {"wikitext2": 6.0, "ptb": 30.0, "c4": None}
    assert union["unavailable"] == {"c4": "no network"}
    assert union["zero_shot"] == {"piqa": ACCURACY, "boolq": ACCURACY}
    assert union["provenance"]["zero_shot"] == {
        **HEADER,
        "tasks": {"piqa": {"version": 1, "num_fewshot": 0}, "boolq": {"version": 2, "num_fewshot": 0}},
    }
    assert "replaced" not in union["provenance"]


def test_a_task_scored_by_another_lm_eval_says_so_in_its_own_record() -> None:
    union, _ = merged(RESULTS, scores_of(zero_shot={"boolq": ACCURACY}, header=HEADER | {"lm_eval": "0.4.13"}))
    records = union["provenance"]["zero_shot"]
    assert records["lm_eval"] == "0.4.12"
    assert records["tasks"]["boolq"] == {"version": 2, "num_fewshot": 0, "lm_eval": "0.4.13"}


def test_a_replaced_score_is_told_and_kept_with_its_record() -> None:
    union, told = merged(RESULTS, scores_of({"wikitext2": 6.5}, {"piqa": {"acc,none": 0.6}}))
    assert union["perplexity"]["wikitext2"] == 6.5
    assert "wikitext2: 6.0 is replaced by 6.5 (tokens_sha256 aa before, bb now)" in told[0]
    assert "version 1 before, 2 now" in told[1]
    assert [(kept["name"], kept["value"]) for kept in union["provenance"]["replaced"]] == [
        ("wikitext2", 6.0),
        ("piqa", ACCURACY),
    ]
    assert union["provenance"]["replaced"][1]["record"]["lm_eval"] == "0.4.12"


def test_a_score_that_cannot_be_had_anew_stays() -> None:
    union, told = merged(RESULTS, scores_of({"wikitext2": None}, unavailable={"wikitext2": "no network"}))
    assert union["perplexity"]["wikitext2"] == 6.0
    assert "wikitext2" not in union["unavailable"]
    assert "its earlier score is kept" in told[0]


def test_scores_join_results_that_hold_none() -> None:
    union, told = merged({}, scores_of({"c4": 7.0}, {"piqa": ACCURACY}))
    assert told == []
    assert union["perplexity"] == {"c4": 7.0}
    assert union["provenance"]["zero_shot"] == {**HEADER, "tasks": {"piqa": {"version": 2, "num_fewshot": 0}}}


def test_text_samples_come_by_themselves_beside_new_scores_alone_and_each_once() -> None:
    assert remaining(ASKED, 0, 4096, RESULTS).settings.prompts is None
    spoken = RESULTS | {"texts": {PROMPTS[0]: "there was"}}
    assert remaining(ASKED, 0, 4096, spoken).settings.prompts == PROMPTS[1:]
    known = replace(ASKED, perplexity_sets=("wikitext2",))
    left = remaining(replace(known, tasks=()), 0, 4096, RESULTS)
    assert (left.settings.prompts, left.known) == (None, ("perplexity on wikitext2: already scored, 6.0000",))
    asked = remaining(replace(known, tasks=(), prompts=(PROMPTS[0],)), 0, 4096, spoken)
    assert (asked.settings.prompts, asked.known[-1]) == ((), "text samples are known")
