"""What a run sends to Weights & Biases besides its own folder; offline by default, and never able to end a run.

`step/*` is drawn over `optimisation_step` (which counts on from block to block), `block/*` and `allocated/<linear>`
over `block`, a mixture's experts as one, `recovery/*` over `recovery_step`; each score is logged once, so that it has a
chart, and stands in the summary. A series that would be one number or another's copy is left out: what is known of the
blocks beside their loss is logged at the end, where it varies. Any failure of W&B is one warning: metrics.jsonl holds
the same numbers. The network is touched in mode `online` alone; a server that does not answer costs INIT_TIMEOUT, then
the run is offline.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from besa_exp.blocks.reports import BlockReport, LinearReport, Step, share_of_zeros
from besa_exp.blocks.sparsity_table import linear_type
from besa_exp.display.wandb_run import forget_run, start_run
from besa_exp.evaluation.score import Scores, set_names, stderr_key
from besa_exp.machine.environment import without_folders
from besa_exp.settings import TrackerSettings

if TYPE_CHECKING:
    import wandb

TABLE_COLUMNS = ("block", "linear", "weights", "pruned", "sparsity", "allocated")
SAME = 1e-4  # sparsities that differ by less are one
HISTOGRAM_BINS = 50  # of the rows' sparsities, from 0 to 1
logger = logging.getLogger(__name__)


class Tracker:
    """Where a run's numbers go as they appear: an open W&B run until the first failure, which is said once; without a
    run nowhere."""

    def __init__(self, run: wandb.Run | None = None):
        self._run: Any = run
        known = run.summary if run and run.resumed else {}  # the server has them
        self._known_blocks = int(known.get("block", -1)) + 1
        self._known_recovery = int(known.get("recovery_step", -1)) + 1
        self._num_steps = 0
        self._reports: list[BlockReport] = []
        self._works = run is not None

    def _log_steps(self, steps: Sequence[Step]) -> None:
        """The terms of the loss where there are two, and the expected sparsity where it moves."""
        shown = ["loss", *(["reconstruction", "penalty"] if any(step.penalty for step in steps) else [])]
        shown += ["expected_sparsity"] if _varies([step.expected_sparsity for step in steps]) else []
        for step in steps:
            values = {f"step/{name}": getattr(step, name) for name in shown}
            line = {"optimisation_step": self._num_steps, "step/block": step.block, **values}
            self._num_steps += 1
            self._attempt(partial(self._run.log, line))

    def log_block(self, report: BlockReport) -> None:
        if self._run is None:
            return
        self._reports.append(report)
        if report.index < self._known_blocks:
            self._num_steps += len(report.steps)
            return
        self._log_steps(report.steps)
        values = {"block": report.index, "block/reconstruction_loss": report.loss_after}
        if report.loss_before != report.loss_after:
            values["block/reconstruction_loss_start"] = report.loss_before
        self._attempt(lambda: self._run.log(values))

    def log_rows(self, block: int, linears: Mapping[str, Sequence[float]]) -> None:
        """How sparse each row of each linear of a block is."""
        self._attempt(lambda: self._log_rows(block, linears))

    def _log_rows(self, block: int, linears: Mapping[str, Sequence[float]]) -> None:
        import numpy
        import wandb

        by_type: dict[str, list[Sequence[float]]] = {}
        for name, rows in linears.items():
            by_type.setdefault(linear_type(name), []).append(rows)
        drawn = {}
        for kind, rows in by_type.items():
            counted = numpy.histogram(numpy.concatenate(rows), HISTOGRAM_BINS, (0, 1))
            if (counted[0] > 0).sum() > 1:  # else they are all alike
                drawn[f"rows/{kind}"] = wandb.Histogram(np_histogram=counted)
        if drawn:
            self._run.log({"block": block, **drawn})

    def log_recovery_step(self, step: Mapping[str, Any]) -> None:
        """One step of the recovery, as its line of metrics.jsonl has it."""
        if step["step"] < self._known_recovery:
            return
        shown = ("loss", "gradient_norm", "held_out")
        values = {f"recovery/{name}": step[name] for name in shown if step[name] is not None}
        self._attempt(lambda: self._run.log({"recovery_step": step["step"], **values}))

    def log_scores(self, scores: Scores, dense: Scores | None = None, before: Scores | None = None) -> None:
        """Scores of the pruned model, of the dense one where it was scored, and of the one before a recovery."""
        logged, values = _values(scores), _summary(scores)
        for model, others in (("dense", dense), ("before", before)):
            if others is not None:
                logged |= {f"{model}/{name}": value for name, value in _values(others).items()}
                values |= {f"{model}/{name}": value for name, value in _summary(others).items()}
        self.log_summary(values | logged)
        self._attempt(lambda: self._run.log(logged) if logged else None)
        if scores.texts:
            self._attempt(lambda: self._log_texts(scores.texts, dense.texts if dense else {}))

    def _log_texts(self, texts: Mapping[str, str], dense: Mapping[str, str]) -> None:
        import wandb

        rows: list[Any] = [[prompt, dense.get(prompt, ""), text] for prompt, text in texts.items()]
        self._run.log({"texts": wandb.Table(columns=["prompt", "dense", "pruned"], data=rows)})

    def log_summary(self, values: Mapping[str, float | str]) -> None:
        self._attempt(lambda: self._run.summary.update(dict(values)))

    def finish(self, failed: bool = False) -> None:
        """Closes the run, with the table of all blocks where there were any."""
        if self._reports:
            self._attempt(lambda: self._log_allocation(self._reports))
        self._works = self._run is not None  # a run that failed to log is closed all the same
        self._attempt(lambda: self._run.finish(exit_code=int(failed)))

    def _log_allocation(self, reports: Sequence[BlockReport]) -> None:
        import wandb

        rows: list[Any] = [
            [report.index, linear.name, linear.weights, linear.pruned, linear.sparsity, linear.allocated]
            for report in reports
            for linear in report.linears
        ]
        values: dict[str, Any] = {"sparsity/table": wandb.Table(columns=[*TABLE_COLUMNS], data=rows)}
        if importlib.util.find_spec("matplotlib"):
            values["sparsity/heat_map"] = wandb.Image(_heat_map(reports))
        else:
            logger.info("no heat map of the sparsity for W&B: it needs matplotlib (pip install 'besa-exp[report]')")
        self._run.log(values)
        for line in _varying(reports):
            self._run.log(line)
        linears = (linear for report in reports for linear in report.linears)
        self._run.summary["measured_sparsity"] = share_of_zeros(linears)

    def _attempt(self, act: Callable[[], object]) -> None:
        if not self._works:
            return
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run is worth more
            self._works = False
            logger.warning("W&B logging stopped (%s). The run continues; metrics.jsonl is complete.", _one_line(error))


def start_tracker(
    settings: TrackerSettings, folder: Path, config: Mapping[str, Any], run_name: str, pruner: str
) -> Tracker:
    """The tracker that `settings` ask for, its files in `folder`/wandb; without W&B a warning and a tracker of nothing.

    `config` (plain values) is logged with its secrets masked. A second start in one folder continues with the same
    id: offline from the first block, because the caller logs the finished ones again; online after the last block that
    W&B knows."""
    if settings.name == "none" or settings.mode == "disabled":
        return Tracker()
    try:
        return Tracker(start_run(settings, folder, config, run_name, pruner))
    except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run is worth more
        if settings.mode == "online":
            logger.warning("W&B cannot be reached (%s): logging offline, `wandb sync` sends it later", _one_line(error))
            forget_run(folder)  # W&B's process still holds the one that failed
            return start_tracker(replace(settings, mode="offline"), folder, config, run_name, pruner)
        logger.warning(
            "W&B cannot be used (%s). The run continues without it; metrics.jsonl is complete.", _one_line(error)
        )
        return Tracker()


def _varies(values: Sequence[float]) -> bool:
    """By more than rounding."""
    return max(values, default=0) - min(values, default=0) > SAME


def _varying(reports: Sequence[BlockReport]) -> Iterator[dict[str, float]]:
    """A line a block of sparsities: the block's own, and those allocated to its linears, where they are not the same in
    all blocks and linears."""
    allocated = [_by_type(report, "allocated") for report in reports]
    deals = _varies([value for own in allocated for value in own.values()])
    differs = _varies([report.sparsity for report in reports if report.linears])
    for report, own in zip(reports, allocated, strict=True):
        values = {f"allocated/{kind}": value for kind, value in own.items()} if deals else {}
        values |= {"block/sparsity": report.sparsity} if differs else {}
        if values:
            yield {"block": report.index, **values}


def _values(scores: Scores) -> dict[str, float]:
    """`perplexity/wikitext2`, `zero_shot/piqa/acc`: each score under a name without folders, as far as that
    tells it from the others."""
    short, values = set_names(scores.scores), {}
    for score in scores.scores:
        name = short.get(score.name, score.name) if score.kind == "perplexity" else score.name
        if score.value is not None:
            values["/".join(part for part in (score.kind, name, score.metric.removesuffix(",none")) if part)] = (
                score.value
            )
    return values


def _summary(scores: Scores) -> dict[str, float | str]:
    """Summary values beside the scores: their standard errors, speeds, cost, and what is not available and why."""
    values: dict[str, float | str] = {
        f"zero_shot/{score.name}/{stderr_key(score.metric).removesuffix(',none')}": score.stderr
        for score in scores.scores
        if score.stderr is not None
    }
    for name, speed in (("simulated_speed", scores.simulated_speed), ("speed", scores.speed)):
        for kind, row in speed.get("linears", {}).items():
            values |= {f"{name}/{kind}/{key}": value for key, value in row.items() if value is not None}
    for key, value in scores.cost.items():
        rows = value if isinstance(value, Mapping) else {"": value}
        values |= {f"cost/{key}/{batch}".rstrip("/"): number for batch, number in rows.items()}
    return values | {
        f"unavailable/{Path(name).name}": without_folders(reason) for name, reason in scores.unavailable.items()
    }


def _by_type(report: BlockReport, field: str) -> dict[str, float]:
    """Means over the linears of a type, weighted by weights: a mixture's experts are one, not hundreds of charts."""
    linears: dict[str, list[LinearReport]] = {}
    for linear in report.linears:
        linears.setdefault(linear_type(linear.name), []).append(linear)
    return {
        kind: fmean((getattr(linear, field) for linear in found), [linear.weights for linear in found])
        if len(found) > 1
        else getattr(found[0], field)
        for kind, found in linears.items()
    }


def _heat_map(reports: Sequence[BlockReport]) -> Any:
    """Measured sparsity as a picture, blocks down and linears across; colours span the values that occur."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyplot would choose a display and keep the figure
    from matplotlib.figure import Figure
    from PIL import Image

    by_block = [_by_type(report, "sparsity") for report in reports]
    names = list(dict.fromkeys(kind for block in by_block for kind in block))
    grid = [[block.get(name, float("nan")) for name in names] for block in by_block]
    figure = Figure(figsize=(2.5 + 0.8 * len(names), 1.8 + 0.3 * len(reports)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    picture = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(reports)), [str(report.index) for report in reports])
    axes.set_ylabel("block")
    figure.colorbar(picture, ax=axes, label="sparsity")
    png = BytesIO()
    canvas.print_png(png)
    return Image.open(png)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
