"""What evaluation measures, flat: one value a metric, with what makes two of them comparable. No torch here.

results.json holds scores as `perplexity` {set: value}, `zero_shot` {task: {lm-eval's metric: value}}, `unavailable`
{set or task: reason} and their records under `provenance`. `Scores.to_dict` and `Scores.from_dict` alone know that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

COMMON = "tasks"  # in the record of zero-shot scores; fields next to this key are defaults for all tasks
PARTS = ("simulated_speed", "speed", "cost", "texts")  # what stands as it is in results.json, where it is there
FALLING = (
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "mse",
)  # metrics, where no record says so
Kind = Literal["perplexity", "zero_shot"]


@dataclass(frozen=True)
class Score:
    """`metric` is lm-eval's own, such as `acc,none`, and empty for a perplexity; `value` None: it is not available.
    `n`: questions or tokens that were scored. `conditions`: the set's or task's record, of a task without what all
    tasks have in common."""

    kind: Kind
    name: str
    metric: str
    value: float | None
    stderr: float | None = None
    n: int | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, float]:
        """The value, and its standard error where there is one, under lm-eval's keys; nothing where there is none."""
        if self.value is None:
            return {}
        error = {} if self.stderr is None else {stderr_key(self.metric): self.stderr}
        return {self.metric: self.value, **error}

    @property
    def label(self) -> str:
        """`perplexity wikitext2`, `piqa acc`, or `gsm8k exact_match (strict-match)` where answers are filtered."""
        of = f"perplexity {self.name}" if self.kind == "perplexity" else f"{self.name} {metric_name(self.metric)}"
        return of + self.under

    @property
    def under(self) -> str:
        """` (skipping=ffn)` where the model skipped something."""
        skipping = self.conditions.get("skipping")
        return f" (skipping={skipping['name']})" if skipping else ""

    @property
    def path(self) -> str:
        """The place of the value among summary values: `perplexity/wikitext2`, `zero_shot/piqa/acc,none`."""
        return "/".join(part for part in (self.kind, self.name, self.metric) if part)

    @property
    def rises(self) -> bool:
        """Whether more is better: never of a perplexity, of a task's metric as lm-eval has it."""
        known, name = self.conditions.get("higher_is_better") or {}, self.metric.partition(",")[0]
        return self.kind != "perplexity" and known.get(name, name not in FALLING) is not False

    @property
    def shown(self) -> str:
        """`0.3750 ± 0.1830`, the standard error where there is one."""
        if self.value is None:
            return "n/a"
        return f"{self.value:.4f}" + (f" ± {self.stderr:.4f}" if self.stderr is not None else "")


def metric_name(metric: str) -> str:
    """`acc`, or `exact_match (strict-match)` where lm-eval filters the answers."""
    name, _, which = metric.partition(",")
    return name + (f" ({which})" if which not in ("", "none") else "")


def stderr_key(metric: str) -> str:
    """lm-eval's key of a metric's standard error."""
    name, _, which = metric.partition(",")
    return f"{name}_stderr,{which}"


def perplexity_score(name: str, value: float | None, record: Mapping[str, Any]) -> Score:
    """Of a set, None where it could not be scored."""
    return Score("perplexity", name, "", value, n=record.get("num_tokens"), conditions=record)


def task_scores(name: str, metrics: Mapping[str, Any], record: Mapping[str, Any]) -> list[Score]:
    """Of a task, one a metric; standard errors join theirs."""
    return [
        Score("zero_shot", name, key, value, metrics.get(stderr_key(key)), record.get("documents"), record)
        for key, value in metrics.items()
        if not key.partition(",")[0].endswith("_stderr")
    ]


@dataclass(frozen=True)
class Scores:
    """All of one model. `unavailable` {set, task or speed: reason}; `common`: what all tasks' records have in common;
    `simulated_speed` and `speed` as `simulate_model` and `measure_model` give them, where they were asked for; `cost`:
    `counts_of` the model and, where asked for, `speeds_of` it; `texts` {prompt: what the model goes on with}."""

    scores: tuple[Score, ...] = ()
    unavailable: Mapping[str, str] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)
    simulated_speed: Mapping[str, Any] = field(default_factory=dict)
    speed: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def perplexity(self) -> dict[str, float | None]:
        """{set: value}, as in results.json."""
        return {score.name: score.value for score in self.of("perplexity")}

    @property
    def zero_shot(self) -> dict[str, dict[str, float]]:
        """{task: {lm-eval's key: value}}, as in results.json."""
        tasks: dict[str, dict[str, float]] = {}
        for score in self.of("zero_shot"):
            tasks.setdefault(score.name, {}).update(score.numbers)
        return tasks

    @property
    def provenance(self) -> dict[str, Any]:
        """The records, as in results.json."""
        records = {score.name: score.conditions for score in self.of("perplexity") if score.conditions}
        tasks = {score.name: score.conditions for score in self.of("zero_shot")}
        return {"perplexity": records, "zero_shot": {**self.common, COMMON: tasks} if self.common or tasks else {}}

    def of(self, kind: str) -> list[Score]:
        return [score for score in self.scores if score.kind == kind]

    def named(self, kind: str, name: str) -> tuple[Score, ...]:
        """Those of a set or task that have a value."""
        return tuple(score for score in self.of(kind) if score.name == name and score.value is not None)

    def conditions(self, score: Score) -> dict[str, Any]:
        """A score's own with what holds for all tasks."""
        return {**(self.common if score.kind == "zero_shot" else {}), **score.conditions}

    def to_dict(self) -> dict[str, Any]:
        """The part of results.json that they are, but for `provenance`."""
        values = {"perplexity": self.perplexity, "zero_shot": self.zero_shot, "unavailable": dict(self.unavailable)}
        under = {score.name: score.conditions["skipping"] for score in self.scores if "skipping" in score.conditions}
        values |= {"skipping": under} if under else {}
        return values | {name: dict(part) for name in PARTS if (part := getattr(self, name))}

    @staticmethod
    def from_dict(results: Mapping[str, Any], provenance: Mapping[str, Any] | None = None) -> Scores:
        """The inverse, of any results.json or its part `dense`, of which the records stand in the whole's
        `provenance`."""
        known = (results.get("provenance") if provenance is None else provenance) or {}
        records = known.get("zero_shot") or {}
        under = results.get("skipping") or {}  # of the dense model: what it skipped itself
        sets, tasks = (_under(found or {}, under) for found in (known.get("perplexity"), records.get(COMMON)))
        found = [
            perplexity_score(name, value, sets.get(name) or {})
            for name, value in (results.get("perplexity") or {}).items()
        ]
        for name, metrics in (results.get("zero_shot") or {}).items():
            found += task_scores(name, metrics, tasks.get(name) or {})
        common = {key: value for key, value in records.items() if key != COMMON}
        parts = {name: results.get(name) or {} for name in PARTS}
        return Scores(tuple(found), results.get("unavailable") or {}, common, **parts)


def _under(records: Mapping[str, Any], skipping: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The records, also of what has none else, with what was skipped."""
    plain = {name: {key: record[key] for key in record if key != "skipping"} for name, record in records.items()}
    skipped = {name: {"skipping": what} for name, what in skipping.items()}
    return {name: plain.get(name, {}) | skipped.get(name, {}) for name in [*plain, *skipping]}


def set_names(scores: Iterable[Score]) -> dict[str, str]:
    """{perplexity set: its name without folders}; of files of one name as many folders as tell them apart."""
    parts = {score.name: Path(score.name).parts for score in scores if score.kind == "perplexity"}

    def is_told(name: str, count: int) -> bool:
        return not any(own[-count:] == parts[name][-count:] for other, own in parts.items() if other != name)

    counts = {name: next((k for k in range(1, len(own)) if is_told(name, k)), len(own)) for name, own in parts.items()}
    return {name: str(Path(*own[-counts[name] :])) for name, own in parts.items()}


def skipped_parts(scores: Iterable[Score]) -> dict[str, str]:
    """{set or task: `24.6 % of FFNs skipped`} of the scores under a policy."""
    found = {}
    for score in scores:
        if under := score.conditions.get("skipping"):
            what = "prompts' blocks" if under["name"] == "shortgpt_gen" else "FFNs"
            bound = under.get("threshold", (under.get("found") or {}).get("threshold"))
            at = "" if bound is None else f", threshold {bound:.4f}"
            found[score.name] = f"{100 * under['skipped']:.1f} % of {what} skipped ({under['name']}{at})"
    return found


def asked_of(skipping: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of a score's record of what was skipped, what was asked; {}: nothing was skipped."""
    return {key: value for key, value in (skipping or {}).items() if key not in ("found", "skipped")}


PREFERRED = ("acc_norm,none", "acc,none")  # of several metrics the one that stands for the task


def main_scores(scores: Iterable[Score]) -> list[Score]:
    """For each task the score that stands for it: a preferred metric, else its first."""
    tasks: dict[str, dict[str, Score]] = {}
    for score in scores:
        if score.kind == "zero_shot":
            tasks.setdefault(score.name, {})[score.metric] = score
    return [
        next((metrics[key] for key in PREFERRED if key in metrics), next(iter(metrics.values())))
        for metrics in tasks.values()
    ]


def partly_scored(scores: Iterable[Score]) -> dict[str, str]:
    """{task: `8 of 1,838 questions`} of the tasks of which evaluator.limit left questions out, and {set: `8 of 415
    windows`} of the sets of which evaluator.max_windows left windows out."""
    found = {}
    for score in scores:
        if score.kind == "perplexity" and "max_windows" in score.conditions:
            found[score.name] = f"{score.conditions['num_windows']:,} of {score.conditions['windows']:,} windows"
        there = score.conditions.get("questions")
        if score.kind == "zero_shot" and score.n is not None and there is not None and score.n < there:
            found[score.name] = f"{score.n:,} of {there:,} questions"
    return found
