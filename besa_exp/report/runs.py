"""One run folder as frozen values: what was asked, what came out, and how far it got.

A folder that cannot be read whole is a run with a status and an error, never an exception: one broken run must not
hide two hundred others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from besa_exp.blocks.reports import BlockReport, Size
from besa_exp.display.missed_target import missed_by
from besa_exp.display.rows import Rows, cost_table, stage_lines, text_table
from besa_exp.errors import RunError
from besa_exp.evaluation.score import Score, Scores, asked_of
from besa_exp.machine import atomic
from besa_exp.report.methods import Method, full_config, method_of
from besa_exp.run_folder.folder import read_results
from besa_exp.run_folder.inputs import weights_read
from besa_exp.run_folder.lookup import read_config
from besa_exp.run_folder.status import KILLED, read_status, seen_status

COUNTED = ("bytes", "cache_bytes_per_token", "flops_per_token")  # of results.json's cost
CHECKPOINT = "checkpoint"  # the method of what besa evaluate scored and no run made
DATA_FREE = ("dense", CHECKPOINT)  # methods whose scores do not depend on the calibration set
# Of a file cut off or changed.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError)


@dataclass(frozen=True)
class Measure:
    """What a score is of: `kind` is perplexity or zero_shot, `name` the set or task, `metric` lm-eval's own; `lower`:
    less is better."""

    kind: str
    name: str
    metric: str = ""
    lower: bool = field(default=True, compare=False)

    @property
    def label(self) -> str:
        """As a person reads it; of a file its last two parts."""
        name = "/".join(Path(self.name).parts[-2:]) if self.kind == "perplexity" else self.name
        return f"{name} {self.metric}".strip()


@dataclass(frozen=True)
class ScoreRecord:
    """A measured value; `facets` are the things that make two of them comparable, each {what: which}."""

    measure: Measure
    value: float
    facets: Mapping[str, str]


@dataclass(frozen=True)
class RunRecord:
    """One run folder. Only a run whose `status` is done has results."""

    folder: str
    status: str  # done, failed, interrupted, interrupted (killed), running, unreadable
    error: str | None
    finished: str
    command: str | None
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    model: str
    weights_read: str  # see run_folder.inputs; "" where it is not known
    method: Method
    pattern: str
    seed: int | None
    target: float | None
    measured: float | None
    parameters: Size | None  # None: of a run of an older version
    blocks: tuple[BlockReport, ...]
    weights: int  # of the linears in the dense model's blocks, also of those that stay dense
    scores: tuple[ScoreRecord, ...]
    dense_scores: tuple[ScoreRecord, ...]
    unavailable: Mapping[str, str]
    calibration: Mapping[str, Any]
    seconds: Mapping[str, float]
    memory: Mapping[str, int]
    quantisation: Mapping[str, Any]
    simulated_speed: Mapping[str, Any]  # of a cycle model: nothing is measured
    costs: Mapping[str, Any]  # counted, and measured where that was asked for
    stages: Mapping[str, str]  # what was removed and tuned, in a line each
    texts: Rows  # what the model says
    cost: Rows

    @property
    def missed(self) -> float:
        """Measured less target sparsity where that is half a point or more, else 0."""
        unknown = self.target is None or self.measured is None or self.method.pruner == "dense"
        return 0.0 if unknown else missed_by(self.target, self.measured)  # type: ignore[arg-type]

    @property
    def prunes(self) -> bool:
        """Whether its blocks are pruned one by one: not where a dense model is scored, or a checkpoint scored or
        tuned."""
        return self.method.pruner not in DATA_FREE and self.config.get("checkpoint") is None

    @property
    def path(self) -> Path:
        return Path(self.folder)


def read_run(path: Path) -> RunRecord:
    status, config = read_status(path) or {}, read_config(path)
    state = seen_status(path) or "done"
    killed = "its process was killed; run the same command again to resume" if state == KILLED else None
    status = status | {"status": state, "error": killed or status.get("error")}  # as they are shown to a person
    if state == "done":
        try:
            return _checked(_run(path, status, config, read_results(path)))
        except UNREADABLE as problem:
            told = f"results.json cannot be read ({type(problem).__name__}: {problem})"
            status = status | {"status": "unreadable", "error": told}
    try:
        return _checked(_run(path, status, config, {}))
    except UNREADABLE:
        return _run(path, status, {}, {})


def _checked(run: RunRecord) -> RunRecord:
    """The run, when all that others reckon with is a number, a mapping or hashable; else one of UNREADABLE."""
    for name, number in _numbers(run):
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{name} is {number!r}")
    provenance = run.calibration.get("provenance") or {}
    hash((run.model, run.finished, run.calibration.get("tokens_sha256"), provenance.get("file")))
    for mapping in (run.environment, run.unavailable, run.quantisation, run.simulated_speed, run.costs, run.memory):
        mapping.items()
    return run


def _numbers(run: RunRecord) -> Iterator[tuple[str, Any]]:
    """What is counted or averaged, by its name in results.json."""
    facts = {"seed": run.seed, "target_sparsity": run.target, "measured_sparsity": run.measured}
    yield from ((name, number) for name, number in facts.items() if number is not None)
    yield from ((f"seconds, {part}", number) for part, number in run.seconds.items())
    yield from ((f"cost, {key}", run.costs[key]) for key in COUNTED if key in run.costs)
    yield from ((score.measure.label, score.value) for score in (*run.scores, *run.dense_scores))
    yield from vars(run.parameters).items() if run.parameters else ()
    for block in run.blocks:
        losses = ("loss_before", "loss_after") if run.prunes else ()
        yield from ((f"blocks, {key}", getattr(block, key)) for key in ("index", "seconds", *losses))
        for linear in block.linears:
            yield from ((f"blocks, {linear.name}", x) for x in (linear.weights, linear.pruned, linear.allocated))


def _run(path: Path, status: Mapping[str, Any], config: Mapping[str, Any], results: Mapping[str, Any]) -> RunRecord:
    name = results.get("pruner") or config.get("method") or ("unknown" if "process" in status else CHECKPOINT)
    pattern = str(results.get("pattern") or config.get("pattern") or "unstructured")
    model = config.get("model")
    of_config = model if isinstance(model, Mapping) else {}
    given = results.get("model_name") or results.get("model") or of_config.get("name") or of_config.get("path")
    sizes = results.get("parameters")
    tuned = config.get("checkpoint") is not None and "pruner" in results  # its model is the one that was pruned
    pruned = [block for block in results.get("blocks") or () if "reconstruction_loss" in block]  # not scored alone
    return RunRecord(
        folder=str(path),
        status=status["status"],
        error=status["error"],
        finished=str(status.get("finished") or ""),
        command=status.get("command"),
        config=config,
        environment=results.get("environment") or _environment(path),
        model=str(given or "unknown").rstrip("/").rpartition("/")[2],
        weights_read="" if tuned else weights_read(path, "model.path" if "pruner" in results else CHECKPOINT),
        method=method_of(str(name), full_config(config, results), pattern, str(status.get("command") or "")),
        pattern=pattern,
        seed=results.get("seed", config.get("seed")),
        target=results.get("target_sparsity", config.get("sparsity")),
        measured=results.get("measured_sparsity"),
        parameters=Size(**sizes) if sizes else None,
        blocks=tuple(map(BlockReport.from_dict, pruned)),
        weights=_weights(results),
        scores=tuple(_records(Scores.from_dict(results))),
        dense_scores=tuple(_records(Scores.from_dict(results.get("dense") or {}, results.get("provenance") or {}))),
        unavailable=results.get("unavailable") or {},
        calibration=results.get("calibration") or {},
        seconds=results.get("seconds") or {},
        memory=results.get("peak_memory_bytes") or {},
        quantisation=results.get("quantisation") or {},
        simulated_speed=results.get("simulated_speed") or {},
        costs=results.get("cost") or {},
        stages=stage_lines(results),
        texts=text_table(results),
        cost=cost_table(results),
    )


def _weights(results: Mapping[str, Any]) -> int:
    blocks = results.get("blocks") or ()
    reported = sum(linear["weights"] for block in blocks for linear in block["linears"].values())
    structure = results.get("structure")
    return structure["weights"]["dense"] if structure else results.get("weights_in_blocks", reported)


def _environment(path: Path) -> Mapping[str, Any]:
    with suppress(RunError):  # one that may not be read
        return atomic.read_json(path / "environment.json") or {}
    return {}


def _records(scores: Scores) -> Iterator[ScoreRecord]:
    """Every score of one model, the mean over its zero-shot tasks too."""
    by_metric: dict[str, list[ScoreRecord]] = {}
    for score in scores.scores:
        if score.value is None:
            continue
        metric = score.metric.removesuffix(",none")
        record = ScoreRecord(
            Measure(score.kind, score.name, metric, not score.rises), score.value, _facets(scores, score)
        )
        yield record
        there = score.conditions.get("questions")
        whole = scores.common.get("limit") is None if there is None else score.n == there
        if score.kind == "zero_shot" and whole:  # a mean over tasks has no place for a score on the first few questions
            by_metric.setdefault(metric, []).append(record)
    for metric, records in by_metric.items():
        if len(records) > 1:
            yield _mean(records, metric)


def _facets(scores: Scores, score: Score) -> dict[str, str]:
    record = score.conditions
    under = asked_of(record.get("skipping"))
    skipped = {"skipping": ", ".join(f"{key} {value}" for key, value in under.items())} if under else {}
    if score.kind == "perplexity":
        return skipped | {
            "evaluation tokens": str(record.get("tokens_sha256", "unknown"))[:12],
            "evaluation window": f"{record.get('seq_len', 'unknown')} tokens",
        }
    data = str(record.get("data", "unknown"))
    return skipped | {
        "task version": str(record.get("version", "unknown")),
        "num_fewshot": str(record.get("num_fewshot", "unknown")),
        "questions": str(record.get("documents", scores.common.get("limit") or "all")),
        "context": f"{scores.common.get('max_length', 'unknown')} tokens",
        "task data": data.rpartition("sha256:")[2][:12] if "sha256:" in data else data,
    }


def _mean(scores: Sequence[ScoreRecord], metric: str) -> ScoreRecord:
    """The mean over tasks; comparable only with the mean over the same tasks, measured alike."""
    facets = {f"{score.measure.name}, {what}": which for score in scores for what, which in score.facets.items()}
    facets["tasks"] = ", ".join(sorted(score.measure.name for score in scores))
    measure = Measure("zero_shot", f"mean of {len(scores)} tasks", metric, scores[0].measure.lower)
    return ScoreRecord(measure, sum(score.value for score in scores) / len(scores), facets)
