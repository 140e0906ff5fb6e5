"""The folder of one run: locked while the run lives, its files whole or line by line, its state always known.

`metrics.jsonl` is the source of truth, one JSON object a line: `step` (one optimisation step), `block` (one pruned
block), `rows` (quantiles of a block's row sparsities), `model_step` (one of a search over the whole model),
`recovery_step` (one of the whole model's tuning), `scores` (of the pruned or the dense model), each with its `time`.
W&B and the console only show what stands there. No torch here.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from besa_exp.blocks.reports import BlockReport, ModelStep, Step, measured
from besa_exp.errors import ConfigurationError, Interrupted, RunError
from besa_exp.evaluation.score import Scores
from besa_exp.machine import atomic
from besa_exp.machine.environment import masked
from besa_exp.machine.process import is_leader
from besa_exp.run_folder.identity import IDENTITY, check_identity
from besa_exp.run_folder.lock import locked
from besa_exp.run_folder.log import logging_to
from besa_exp.run_folder.status import is_done, now, read_status, write_status

METRICS = "metrics.jsonl"
# What an unfinished run goes on with.
KEPT = (METRICS, "run.log", "blocks", "recovery", "scores.json", "spent.json", "inputs.json", "structure.json")
KEPT += ("structure_search.json", "narrowed", "wandb")
OF_IDENTITY = ("blocks", "recovery", "structure.json", "structure_search.json", "narrowed")  # with no word of their own
# What a run leaves besides .lock and status.json; nothing else in the folder is ever removed.
WRITTEN = ("results.json", "sparsity.csv", "config.yaml", "environment.json", "masks.safetensors")
WRITTEN += ("calibration.safetensors", "row_sparsities.safetensors", "model", *KEPT)
LEFTOVERS = tuple(f".{name}.{state}" for name in (*WRITTEN, "status.json") for state in ("partial", "replaced"))
SPARSITY_COLUMNS = ("block", "linear", "weights", "pruned", "sparsity", "allocated")
SPARSITY_COLUMNS += ("reconstruction_loss_start", "reconstruction_loss")  # of the block; no start where none searches
logger = logging.getLogger(__name__)


class RunFolder:
    """An open run folder, made by `RunFolder.open`; the paths are where a run puts its larger files. Without `writes`
    it is one that another process has open: it has the paths, and writes nothing."""

    def __init__(self, path: Path, writes: bool = True):
        self.path = path
        self.writes = writes
        self.model = path / "model"
        self.masks = path / "masks.safetensors"
        self.tokens = path / "calibration.safetensors"
        self.rows = path / "row_sparsities.safetensors"
        self.metrics = path / METRICS
        self.sparsity = path / "sparsity.csv"
        self.blocks = path / "blocks"
        self.recovery = path / "recovery"
        self.scores = path / "scores.json"
        self.spent = path / "spent.json"
        self.structure = path / "structure.json"
        self.structure_search = path / "structure_search.json"
        self.narrowed = path / "narrowed"

    @classmethod
    @contextmanager
    def open(cls, path: Path, overwrite: bool = False, resume: Mapping[str, Any] | None = None) -> Iterator[RunFolder]:
        """Locks `path` and starts a run in it: status.json says running, then done, failed with the error, or
        interrupted.

        With `resume`, which says what is asked for, an unfinished run of the same goes on; else its files make way for
        the new ones, a finished run's only with `overwrite`. Log records go to run.log too, with the traceback of a
        failure; what was measured until then stays. Raises ConfigurationError when the folder cannot be written to, is
        in use, holds a finished run, an unfinished one of another request, or files that no run wrote."""
        with locked(path):
            _check_free(path, overwrite)
            goes_on = resume is not None and not is_done(path) and not overwrite
            if resume is not None and goes_on:
                check_identity(path / "blocks", resume)
            named = (path / "blocks" / IDENTITY).is_file()  # else nobody says which request the rest is of
            kept = [name for name in KEPT if goes_on and (named or name not in OF_IDENTITY)]
            started, before = now(), read_status(path)
            write_status(path, "running", started)
            for name in (*WRITTEN, *LEFTOVERS):
                if name not in kept:
                    atomic.remove(path / name)
            try:
                with logging_to(path / "run.log"):
                    if before and before["status"] == "running":
                        logger.info(
                            "the attempt of process %s, begun %s, was killed", before["process"], before["started"]
                        )
                    yield cls(path)
            except BaseException as error:
                status = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
                with suppress(OSError):  # a full disk must not hide the error that is on its way
                    write_status(path, status, started, error)
                raise
            write_status(path, "done", started)
            for name in ("scores.json", "spent.json"):  # first: besa evaluate has its own under these names
                atomic.remove(path / name)
            drop_work(path)

    def give_up(self, error: Exception) -> None:
        """The last words of a process whose run is stuck and cannot raise `error` itself."""
        logger.error("%s", error)
        write_status(self.path, "failed", (read_status(self.path) or {}).get("started", now()), error)

    @staticmethod
    def record_failure(path: Path, error: Exception, words: Sequence[str] | None = None) -> None:
        """Writes a failure that the run itself could not report into status.json and run.log; all else stays.
        `words`: of the run's command, where that is not this process's. Raises ConfigurationError as `open` does."""
        with locked(path):
            _check_free(path, overwrite=False)
            started = (read_status(path) or {}).get("started", now())
            with suppress(type(error)), logging_to(path / "run.log"):
                raise error
            write_status(path, "failed", started, error, words)

    def rewind(self, reports: Sequence[BlockReport], scored: bool = True) -> None:
        """metrics.jsonl and sparsity.csv as they were when the blocks of `reports` had been finished. The last word on
        the dense model, where it was `scored` before, and on each step of a search over the whole model stays."""
        if not self.writes:
            return
        lines = [*metric_lines(self.path)]
        kept = {_which(line): line for line in lines if scored and line.get("which") == "dense"}
        kept |= {_which(line): line for line in lines if line.get("kind") == "model_step"}
        with atomic.replaced_file(self.metrics) as partial:
            blocks = [[*map(_step_line, report.steps), _block_line(report)] for report in reports]
            times = {_which(line): line["time"] for line in lines if "time" in line}
            again = [line | {"time": times.get(_which(line), _time())} for line in chain(*blocks)]
            partial.write_text("".join(map(_json_line, [*kept.values(), *again])), encoding="utf-8")
        self.sparsity.unlink(missing_ok=True)
        for report in reports:
            self._append_sparsity(report)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.yaml: the resolved configuration, with `***` in the place of secrets."""
        if self.writes:
            text = yaml.safe_dump(masked(config), sort_keys=False, allow_unicode=True)
            atomic.write_text(self.path / "config.yaml", text)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """environment.json: see `environment.environment`."""
        self._write_json("environment.json", environment)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """results.json, keys sorted but for `linears`, which keep the model's order: equal results are equal bytes.

        Raises RunError, naming the place, on a number that is not finite."""
        self._write_json("results.json", results)

    def log_step(self, step: Step) -> None:
        """One line of metrics.jsonl. Raises RunError, naming block and step, on a number that is not finite."""
        self._append(_step_line(step), f"block index {step.block}, step {step.step}")

    def log_model_step(self, step: ModelStep) -> None:
        """One line of metrics.jsonl for a step of a search over the whole model."""
        self._append({"kind": "model_step", **asdict(step)}, f"step {step.step} of the search over the whole model")

    def log_recovery_step(self, step: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl for a step of the recovery."""
        self._append({"kind": "recovery_step", **step}, f"step {step['step']} of the recovery")

    def log_block(self, report: BlockReport) -> None:
        """One line of metrics.jsonl, and one row a linear of sparsity.csv."""
        self._append(_block_line(report), f"block index {report.index}")
        self._append_sparsity(report)

    def log_rows(self, block: int, linears: Mapping[str, Sequence[float]]) -> None:
        """One line of metrics.jsonl: quantiles over the rows' sparsities of each linear of a block."""
        self._append({"kind": "rows", "block": block, "linears": linears}, f"block index {block}")

    def _append_sparsity(self, report: BlockReport) -> None:
        if not self.writes:
            return
        is_new = not self.sparsity.exists()
        with self.sparsity.open("a", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            if is_new:
                rows.writerow(SPARSITY_COLUMNS)
            for linear in report.linears:
                own = (linear.name, linear.weights, linear.pruned, linear.sparsity, linear.allocated)
                start = report.loss_before if report.loss_before != report.loss_after else None
                losses = (loss if loss is None else measured(loss) for loss in (start, report.loss_after))
                rows.writerow((report.index, *own, *losses))

    def log_scores(self, which: str, scores: Scores) -> None:
        """One line of metrics.jsonl; `which` is `pruned` or `dense`."""
        line = {"kind": "scores", "which": which, **scores.to_dict()}
        self._append(line, f"scores of the {which} model")

    def _append(self, line: dict[str, Any], where: str) -> None:
        if not self.writes:
            return
        _check_finite(line, where)
        line |= {"time": _time()}
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(_json_line(line))

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        _check_finite(content, name)
        text = json.dumps(_ordered(content), indent=2, allow_nan=False, ensure_ascii=False)
        atomic.write_text(self.path / name, text + "\n")


def _time() -> str:
    """Of day, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _which(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a step's or a block's line from all others."""
    return line.get("kind"), line.get("block"), line.get("step")


def _step_line(step: Step) -> dict[str, Any]:
    return {"kind": "step", **asdict(step)}


def _block_line(report: BlockReport) -> dict[str, Any]:
    return {
        "kind": "block",
        "block": report.index,
        "sparsity": report.sparsity,
        "reconstruction_loss": measured(report.loss_after),
        "reconstruction_loss_before": measured(report.loss_before),
        "seconds": report.seconds,
        "linears": {linear.name: linear.to_dict() for linear in report.linears},
    }


def _json_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n"


def drop_work(path: Path) -> None:
    """What a finished run needs no more and may be as large as the model goes, also where the run was killed when it
    had just finished."""
    with suppress(OSError):  # the results are there, in somebody else's folder perhaps
        for name in ("blocks", "narrowed", "recovery"):
            atomic.remove(path / name)


def absent(path: Path) -> list[Path]:
    """The folder and those above it that are not there yet, innermost first."""
    return [place for place in (path, *path.parents) if not place.exists()]


def remove_refused(made: Sequence[Path]) -> None:
    """Of a run that could not begin the folders, innermost first, that were made for it. Another process's run in the
    first, and other things in the others, are left alone."""
    status = read_status(made[0]) if made and is_leader() else {"status": "another's"}
    if status is None or (status["status"] == "failed" and status["process"] == os.getpid()):
        atomic.remove(made[0])
        for parent in made[1:]:
            with suppress(OSError):  # not empty
                parent.rmdir()


def metric_lines(path: Path, kind: str = "") -> Iterator[dict[str, Any]]:
    """The objects of metrics.jsonl, of one kind or of all, in order; none where there is no file. A line that was cut
    off is left out."""
    begins = f'{{"kind": "{kind}"'.encode() if kind else b""
    with suppress(FileNotFoundError), (path / METRICS).open("rb") as file:
        for line in file:
            if line.startswith(begins):
                with suppress(ValueError):
                    yield json.loads(line)


def read_results(path: Path) -> dict[str, Any]:
    return json.loads((path / "results.json").read_text(encoding="utf-8"))


def earlier_results(path: Path) -> dict[str, Any]:
    """The results.json that new scores join; {} where there is none. ConfigurationError: it cannot be read."""
    try:
        return read_results(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        name = path / "results.json"
        raise ConfigurationError(f"{name} cannot be read ({error}); remove it, or name another folder") from error


def _check_free(path: Path, overwrite: bool) -> None:
    if is_done(path) and not overwrite:
        raise ConfigurationError(
            f"{path} holds a finished run, which is left alone; "
            "overwrite=true starts again there, hydra.run.dir= (from Python out=) names another folder"
        )
    # run.log is left out: the command's own logging may have begun it
    foreign = [name for name in (*WRITTEN, "status.json") if name != "run.log" and (path / name).exists()]
    if foreign and read_status(path) is None:
        raise ConfigurationError(
            f"{path} is not a run folder, and a run would replace its {', '.join(foreign)}; name another folder with "
            "hydra.run.dir="
        )


def _ordered(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        return {key: _ordered(value[key], key) for key in (value if name == "linears" else sorted(value))}
    return [_ordered(item) for item in value] if isinstance(value, (list, tuple)) else value


def _check_finite(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(item, f"{where}, {key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_finite(item, f"{where}, {index}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise RunError(f"{where} is {value}: only finite numbers are recorded; model.dtype=float32 avoids overflow")
