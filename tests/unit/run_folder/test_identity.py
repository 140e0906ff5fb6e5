"""A finished run answers its own request and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from besa_exp.errors import ConfigurationError
from besa_exp.run_folder.identity import as_plain, check_finished, check_identity, request_identity

ASKED = {
    "method": "wanda",
    "model": {"path": "org/model", "load": "auto"},
    "pruner": {"_target_": "besa_exp.once.Uniform", "importance": "wanda"},
    "structure": None,
    "sparsity": 0.5,
    "pattern": "unstructured",
    "evaluator": {"tasks": ["piqa"], "limit": None},
    "skipping": None,
    "save": {"model": True, "verify": True},
    "tracker": {"name": "none"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "sparsity: 0.5 before, 0.6 now": {"sparsity": 0.6},
    "method: 'wanda' before, 'wanda+obs' now": {"method": "wanda+obs"},
    "evaluator.tasks: ['piqa'] before, [] now": {"evaluator": {"tasks": [], "limit": None}},
    "save.model: true before, false now": {"save": {"model": False, "verify": True}},
    "skipping: null before": {"skipping": {"name": "ffn", "fraction": 0.25}},
}
SAME: list[dict[str, Any]] = [
    {},
    {"tracker": {"name": "wandb"}},
    {"model": {"path": "org/model", "load": "streamed"}},
    {"pruner": {"_target_": "besa_exp.now.Uniform", "importance": "wanda", "later": 1}},
    {"save": {"model": True, "verify": False}},
]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(ASKED))
    return tmp_path


@pytest.mark.parametrize("difference", OTHERS)
def test_another_request_is_refused_with_the_difference(finished: Path, difference: str) -> None:
    (problem,) = check_finished(finished, {**ASKED, **OTHERS[difference]})
    assert problem.startswith(f"{finished} holds a finished run of another request ({difference}); ")
    more_scores = difference.startswith(("evaluator", "skipping"))
    assert (f"besa evaluate checkpoint={finished}" in problem) == more_scores


@pytest.mark.parametrize("change", SAME, ids=lambda change: "+".join(change) or "nothing")
def test_what_decides_no_result_is_the_same_request(finished: Path, change: dict[str, Any]) -> None:
    assert check_finished(finished, {**ASKED, **change}) == []


def test_a_sparsity_that_the_pattern_fixes_says_nothing(finished: Path) -> None:
    (finished / "config.yaml").write_text(yaml.safe_dump({**ASKED, "pattern": "2:4", "sparsity": 0.5}))
    assert check_finished(finished, {**ASKED, "pattern": "2:4", "sparsity": 0.7}) == []


def test_a_run_that_does_not_say_what_it_was_asked_is_taken_as_it_is(finished: Path) -> None:
    (finished / "config.yaml").write_text("[")
    assert check_finished(finished, ASKED) == []


def test_an_unfinished_tuning_is_not_gone_on_with_under_another_teacher(tmp_path: Path) -> None:
    asked = {"recovery": {"name": "blocks"}, "teacher": "one"}
    (tmp_path / "identity.json").write_text(json.dumps(as_plain(request_identity(asked))))
    with pytest.raises(ConfigurationError, match=r"another request \(teacher: 'one' before, 'two' now\)"):
        check_identity(tmp_path, request_identity({**asked, "teacher": "two"}))
