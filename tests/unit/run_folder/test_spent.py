"""Seconds and memory of a run are those of all its attempts."""

from __future__ import annotations

from pathlib import Path

import pytest

from besa_exp.evaluation.kept_scores import FinishedScores
from besa_exp.methods.budgets.progress import Progress
from besa_exp.run_folder.spent import Spent


class Clock:
    """What both clocks of the system show: the processor half of the time."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now / 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("besa_exp.run_folder.spent.time", found)
    return found


def spent(path: Path, host: int = 100) -> Spent:
    return Spent(path, lambda: {"host": host, "device": 0})


def test_the_next_attempt_counts_on_from_what_was_kept_in_the_middle_of_a_part(clock: Clock, tmp_path: Path) -> None:
    first = spent(tmp_path / "spent.json")
    with first.timed("load"):
        clock.now += 10
    with first.timed("prune"):
        clock.now += 100
        first.keep()
        clock.now += 1000  # a block that is lost with the attempt
    second = spent(tmp_path / "spent.json")
    with second.timed("load"):
        clock.now += 20
    with second.timed("prune"):
        clock.now += 4
    clock.now += 1
    by_part = {"load": 30, "load_processor": 15, "prune": 104, "prune_processor": 52}
    assert second.seconds() == by_part | {"total": 135}


def test_parts_within_parts_and_parts_that_are_entered_twice_are_added(clock: Clock, tmp_path: Path) -> None:
    first = spent(tmp_path / "spent.json")
    for _ in range(2):
        with first.timed("evaluate"), first.timed("save"):
            clock.now += 2
    found = first.seconds()
    assert (found["evaluate"], found["save"], found["total"]) == (4, 4, 4)


def test_the_peak_of_memory_is_that_of_the_largest_attempt(tmp_path: Path) -> None:
    spent(tmp_path / "spent.json", host=300).keep()
    assert spent(tmp_path / "spent.json", host=200).peak_memory() == {"host": 300, "device": 0}
    assert spent(tmp_path / "spent.json", host=400).peak_memory() == {"host": 400, "device": 0}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seconds": 1}', '{"seconds": {"load": "x"}}'])
def test_a_damaged_file_counts_from_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "spent.json").write_text(text)
    assert set(spent(tmp_path / "spent.json").seconds()) == {"total"}


def test_scores_and_searches_that_are_kept_keep_what_was_spent(tmp_path: Path) -> None:
    counted: list[str] = []
    FinishedScores(tmp_path / "scores.json", "dense", lambda: counted.append("score")).keep("perplexity", "a", {}, 1)
    Progress(tmp_path / "search.json", lambda: counted.append("search")).write({"generations": 1})
    assert counted == ["score", "search"]
