"""How a task's score is told in a line: which of its metrics, how certain, and of how many questions. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PREFERRED = ("acc_norm,none", "acc,none")  # of several metrics the one that stands for the task


def main_metric(metrics: Mapping[str, float]) -> str | None:
    """lm-eval's key of the metric that stands for a task: a preferred one, else its first; None: it has none."""
    keys = [key for key in metrics if not key.partition(",")[0].endswith("_stderr")]
    return next((key for key in PREFERRED if key in keys), keys[0] if keys else None)


def metric_name(key: str) -> str:
    """`acc`, or `exact_match (strict-match)` where lm-eval filters the answers."""
    metric, _, which = key.partition(",")
    return metric + (f" ({which})" if which not in ("", "none") else "")


def with_error(metrics: Mapping[str, float], key: str) -> str:
    """`0.3750 ± 0.1830`, the standard error where there is one."""
    metric, _, which = key.partition(",")
    error = metrics.get(f"{metric}_stderr,{which}")
    return f"{metrics[key]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def partly_scored(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(task, `8 of 1,838 questions`) of the tasks of which evaluator.limit left questions out."""
    records = ((results.get("provenance") or {}).get("zero_shot") or {}).get("tasks") or {}
    for task in results.get("zero_shot") or {}:
        record = records.get(task) or {}
        scored, there = record.get("documents"), record.get("questions")
        if scored is not None and there is not None and scored < there:
            yield task, f"{scored:,} of {there:,} questions"
