"""Run folders as values for notebooks: `load_run` one folder, `load_runs` many as one table. No torch until masks are
read; pandas only where a table is asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from besa_exp.blocks.reports import BlockReport
from besa_exp.errors import ConfigurationError
from besa_exp.evaluation.score import Score, Scores, set_names
from besa_exp.presets import METHOD_GROUPS, presets
from besa_exp.report.folders import find_runs
from besa_exp.report.methods import full_config, method_of
from besa_exp.run_folder.folder import metric_lines
from besa_exp.run_folder.status import seen_status

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedRun:
    """A run folder. `results` is results.json, {} where the run is not finished; `config` is config.yaml, {} where it
    is missing; docs/runs.md says what they hold."""

    folder: Path
    status: str  # done, failed, interrupted, interrupted (killed), running; unreadable (of several runs)
    results: Mapping[str, Any]
    config: Mapping[str, Any]

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl: a line for each step, block and scored model."""
        return [*metric_lines(self.folder)]

    @property
    def blocks(self) -> tuple[BlockReport, ...]:
        """The pruned blocks in order."""
        found = {line["block"]: _block(line) for line in self.lines if line.get("kind") == "block"}
        if not found:  # a dense run, whose blocks stand in its results alone
            found = {block["index"]: BlockReport.from_dict(block) for block in self.results.get("blocks") or ()}
        return tuple(found[index] for index in sorted(found))

    @property
    def sparsity(self) -> float | None:
        """The measured fraction of zeros among the linears' weights, in [0, 1]; None where the run is not finished."""
        return self.results.get("measured_sparsity")

    def steps(self) -> Any:
        """A DataFrame with a row for each optimisation step of each block; empty for methods that do not search."""
        return self.table("step")

    def table(self, kind: str) -> Any:
        """A DataFrame of the lines of metrics.jsonl of one kind: step, block, rows, model_step, recovery_step, scores;
        `time` as dates."""
        pandas = _pandas()
        found = pandas.DataFrame([line for line in self.lines if line.get("kind") == kind])
        if "time" in found:
            found["time"] = pandas.to_datetime(found["time"])
        return found.drop(columns="kind", errors="ignore")

    def masks(self) -> dict[str, Any]:
        """{weight's name: keep mask, bool [out in]} from masks.safetensors, on the CPU; {} where the run kept none."""
        file = self.folder / "masks.safetensors"
        if not file.is_file():
            return {}
        from besa_exp.checkpoints.files import load_masks  # imports torch

        return load_masks(file)

    def row(self, names: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The run as one row: what was asked, what came out, each score, and what it took. `names`: what each
        perplexity set is called; by default without folders, as far as that tells it from the run's others."""
        results, config = self.results, self.config
        names = set_names(_all_scores(self)) if names is None else names
        method = str(results.get("pruner") or config.get("method") or "unknown")
        parts, pattern = method.split("+"), results.get("pattern") or config.get("pattern")
        by_group = {group: next((part for part in parts if part in presets(group)), None) for group in METHOD_GROUPS}
        by_group |= {group: results[group] for group in ("budget", "update") if group in results}
        by_group["pruner"] = by_group["pruner"] or method
        model = config.get("model")
        return {
            "model_name": results.get("model_name"),
            "model": results.get("model") or (model.get("path") if isinstance(model, Mapping) else None),
            "method": method,
            "variant": method_of(
                method,
                full_config(config, results),
                str(pattern or "unstructured"),
                str(results.get("command") or ""),
            ).variant,
            **{group: by_group[group] for group in ("pruner", "update", "budget", "structure", "recovery")},
            "ignore": ", ".join(results.get("ignore") or config.get("ignore") or ()),
            "pattern": pattern,
            "target_sparsity": results.get("target_sparsity", config.get("sparsity")),
            "measured_sparsity": results.get("measured_sparsity"),
            "seed": results.get("seed", config.get("seed")),
            **_cost(results.get("cost") or {}),
            **_stages(results),
            **_scores(results, "", names),
            **_scores(results.get("dense") or {}, "dense ", names),
            **{f"{stage}_seconds": value for stage, value in (results.get("seconds") or {}).items()},
            **{f"peak_{place}_bytes": value for place, value in (results.get("peak_memory_bytes") or {}).items()},
            "started": results.get("started"),
            "finished": results.get("finished"),
            "status": self.status,
            "folder": str(self.folder),
        }

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each linear of each block."""
        return linear_table(self.blocks)


@dataclass(frozen=True)
class LoadedRuns(Sequence[LoadedRun]):
    """A sequence of runs in the order of their folders; a slice of it is one too."""

    runs: tuple[LoadedRun, ...]

    def __getitem__(self, index: Any) -> Any:
        return LoadedRuns(self.runs[index]) if isinstance(index, slice) else self.runs[index]

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[LoadedRun]:
        return iter(self.runs)

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each run and a column for each key of `LoadedRun.row`; what a run lacks is NaN.
        Files of one name in two folders are two sets, also of different runs."""
        names = set_names(score for run in self.runs for score in _all_scores(run))
        return _pandas().DataFrame([run.row(names) for run in self.runs])


def load_run(folder: str | Path) -> LoadedRun:
    """The run in a folder, finished or not. ConfigurationError: it is no run folder, or its files cannot be read."""
    path = Path(folder)
    status = seen_status(path)
    results = path / "results.json"
    if status is None and not results.is_file():
        raise ConfigurationError(f"{folder}: no run folder (one holds status.json or results.json)")
    status = status or "done"
    found = _read_json(results) if status == "done" else {}
    config = path / "config.yaml"
    try:
        asked = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{config} cannot be read ({error})") from error
    return LoadedRun(path, status, found, asked if isinstance(asked, dict) else {})


def load_runs(*places: str | Path | Iterable[str | Path]) -> LoadedRuns:
    """The runs at and below folders or patterns such as `outputs/*`; `outputs` where none is named. One whose files
    cannot be read has the status `unreadable`, and hides no other.

    ConfigurationError: a place without a run."""
    named: list[str] = []
    for place in places or ("outputs",):
        named += [str(place)] if isinstance(place, (str, Path)) else map(str, place)
    return LoadedRuns(tuple(map(_readable, find_runs(named))))


def _readable(path: Path) -> LoadedRun:
    try:
        return load_run(path)
    except ConfigurationError as error:
        logger.warning("%s", error)
        return LoadedRun(path, "unreadable", {}, {})


def linear_table(blocks: Iterable[BlockReport]) -> Any:
    """A DataFrame with a row for each linear: its weights, zeros and allocated sparsity, and its block's losses."""
    rows = [
        {
            "block": block.index,
            "linear": linear.name,
            "weights": linear.weights,
            "pruned": linear.pruned,
            "sparsity": linear.sparsity,
            "allocated": linear.allocated,
            "loss_before": block.loss_before,
            "loss_after": block.loss_after,
        }
        for block in blocks
        for linear in block.linears
    ]
    return _pandas().DataFrame(rows)


def _cost(cost: Mapping[str, Any]) -> dict[str, Any]:
    """`bytes`, `flops_per_token`, ... and, where it was timed, `decode_tokens_per_second_1` by batch size."""
    counts = {key: value for key, value in cost.items() if isinstance(value, int | float) and key != "parameters"}
    timed = {key: value for key, value in cost.items() if key.endswith("_per_second")}
    return counts | {f"{key}_{batch}": value for key, by_batch in timed.items() for batch, value in by_batch.items()}


def _stages(results: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of the parameters, and how a recovery moved the held-out loss."""
    size, recovery = results.get("parameters"), results.get("recovery")
    found: dict[str, Any] = {"parameters_left": size["left"] / size["dense"]} if size else {}
    if recovery:
        found |= {f"recovery_loss_{when}": value for when, value in recovery["loss"].items()}
    return found


def _all_scores(run: LoadedRun) -> list[Score]:
    return [score for of in (run.results, run.results.get("dense") or {}) for score in Scores.from_dict(of).scores]


def _scores(results: Mapping[str, Any], prefix: str, names: Mapping[str, str]) -> dict[str, float]:
    perplexities = (results.get("perplexity") or {}).items()
    found = {f"{prefix}perplexity {names[name]}": value for name, value in perplexities}
    for task, metrics in (results.get("zero_shot") or {}).items():
        found |= {f"{prefix}{task} {key.removesuffix(',none')}": value for key, value in metrics.items()}
    return found


def _block(line: Mapping[str, Any]) -> BlockReport:
    """Of a line of metrics.jsonl."""
    losses = {"before": line["reconstruction_loss_before"], "after": line["reconstruction_loss"]}
    return BlockReport.from_dict({**line, "index": line["block"], "reconstruction_loss": losses})


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}")
        return content
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be read ({error}); run the same command again") from error


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ConfigurationError("a table needs pandas: pip install pandas") from error
    return pandas
