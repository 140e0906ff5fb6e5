"""The cache of dense scores that runs side by side share."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_llama

from besa_exp.checkpoints.load import LoadedModel
from besa_exp.evaluation.kept_scores import dense_key, files_of, shared_dense_scores
from besa_exp.evaluation.score import Scores
from besa_exp.settings import EvaluatorSettings

KEY = {"model": {"files": [["model.safetensors", 3, 1]]}, "evaluator": {"perplexity_sets": ("embedded",)}}
SCORES = Scores.from_dict(
    {"perplexity": {"embedded": 12.5}, "provenance": {"perplexity": {"embedded": {"num_tokens": 8, "seq_len": 4}}}}
)


def find(folder: Path, scores: Scores = SCORES, key: dict = KEY) -> tuple[Scores, bool]:
    return shared_dense_scores(folder, key, lambda: scores, lambda: None)


def test_scores_are_found_again_under_the_same_key_alone(tmp_path: Path) -> None:
    assert find(tmp_path) == (SCORES, False)
    assert find(tmp_path) == (SCORES, True)
    assert find(tmp_path, key=KEY | {"model": {"files": [["model.safetensors", 3, 2]]}}) == (SCORES, False)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}', "null"])
def test_a_damaged_entry_is_measured_anew_and_replaced(damage: str, tmp_path: Path) -> None:
    find(tmp_path)
    (entry,) = tmp_path.glob("*.json")
    entry.write_text(damage)
    assert find(tmp_path) == (SCORES, False)
    assert find(tmp_path) == (SCORES, True)


def test_the_key_holds_ones_own_definitions_and_the_seed_where_examples_may_be_drawn(tmp_path: Path) -> None:
    loaded = LoadedModel(tiny_llama(), None, None, tmp_path / "model")

    def key(seed: int, *tasks: str, include_path: Path | None = None) -> dict:
        settings = EvaluatorSettings("test", tasks=tasks, include_path=str(include_path) if include_path else None)
        return dense_key(loaded, settings, seed, True, torch.device("cpu"))

    assert key(0, "piqa") == key(1, "piqa")
    assert key(0, "gsm8k") != key(1, "gsm8k")
    (tmp_path / "own.yaml").write_text("task: own\n")
    before = key(0, "own", include_path=tmp_path)
    (tmp_path / "own.yaml").write_text("task: own\nnum_fewshot: 2\n")
    assert key(0, "own", include_path=tmp_path) != before


def test_scores_of_which_a_part_is_missing_are_not_kept(tmp_path: Path) -> None:
    find(tmp_path, Scores.from_dict({"perplexity": {"c4": None}, "unavailable": {"c4": "not reachable"}}))
    assert not list(tmp_path.glob("*.json"))


def test_a_failure_leaves_nothing_and_the_next_run_measures(tmp_path: Path) -> None:
    def fail() -> Scores:
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError):
        shared_dense_scores(tmp_path, KEY, fail, lambda: None)
    assert find(tmp_path) == (SCORES, False)


def test_one_of_several_measures_and_the_others_wait_for_it(tmp_path: Path) -> None:
    waiting, measured, found = threading.Event(), [], []

    def measure() -> Scores:
        measured.append(1)
        assert waiting.wait(20), "nobody waited"
        return SCORES

    def ask() -> None:
        found.append(shared_dense_scores(tmp_path, KEY, measure, waiting.set))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 1
    assert sorted(known for _, known in found) == [False, True]
    assert all(scores == SCORES for scores, _ in found)


def test_a_folder_that_cannot_be_written_to_costs_only_the_sharing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert find(tmp_path / "file" / "cache") == (SCORES, False)


def test_a_file_is_told_by_its_size_and_time_of_change(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("one")
    before = files_of(tmp_path)
    file.write_text("other")
    assert files_of(tmp_path) != before
    assert [name for name, *_ in files_of(tmp_path)] == ["model.safetensors"]
