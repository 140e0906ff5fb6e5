"""The scores of a run: the dense model's, shared with the runs beside it, the pruned one's, and what was published."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from besa_exp.checkpoints.load import LoadedModel
from besa_exp.evaluation.finished_scores import FinishedScores
from besa_exp.evaluation.scores import Scores, evaluate
from besa_exp.machine import distributed
from besa_exp.runs.dense_scores import FOLDER as DENSE_SCORES
from besa_exp.runs.dense_scores import dense_key, shared_dense_scores
from besa_exp.runs.run import Run
from besa_exp.settings import RunSettings

TOLERANCE = 0.01  # relative, between a published and a measured perplexity
logger = logging.getLogger(__name__)


def score_dense(run: Run, loaded: LoadedModel) -> Scores:
    """The dense model's scores, measured once for all runs beside this one."""
    if distributed.num_ranks() > 1:  # one process locks the shared scores, and all ranks are needed to measure them
        return score(run, "dense", loaded)
    settings, console = run.settings, run.console
    key = dense_key(loaded, settings.evaluator, settings.seed, settings.deterministic, run.device)
    scores, known = shared_dense_scores(
        run.folder.path.parent / DENSE_SCORES,
        key,
        lambda: score(run, "dense", loaded),
        lambda: console.stage("dense model: waiting for another run that scores it"),
    )
    if known:
        console.stage("dense model: scores reused from a run beside this one")
        run.folder.log_scores("dense", scores)
    return scores


def score(run: Run, which: str, loaded: LoadedModel) -> Scores:
    """Scores of the dense or the pruned model, recorded in metrics.jsonl as soon as they are known."""
    settings, console = run.settings, run.console
    earlier = FinishedScores(run.folder.scores, which, run.spent.keep)

    def on_progress(text: str) -> None:
        console.stage(f"{which} model: {text}")

    with run.spent.timed("evaluate"):
        scores = evaluate(
            loaded, settings.evaluator, settings.offline, settings.seed, on_progress, earlier, console.count
        )
    run.folder.log_scores(which, scores)
    return scores


def published(settings: RunSettings, dense: Scores | None) -> dict[str, Any]:
    """The part of results.json that compares the dense model's perplexities with the published ones."""
    compared = compared_with_published(settings.model.published_perplexity, dense) if dense else {}
    return {"published": compared} if compared else {}


def compared_with_published(published: Mapping[str, Mapping[int, float]], dense: Scores) -> dict[str, dict[str, Any]]:
    """{set: {seq_len, published, measured, difference (relative), agrees}} for what was published and measured in the
    same window; a warning in the log for each that does not agree."""
    compared = {}
    for name, by_window in published.items():
        measured, record = dense.perplexity.get(name), dense.provenance["perplexity"].get(name, {})
        value = by_window.get(record.get("seq_len", 0))
        if measured is None or value is None:
            continue
        difference = measured / value - 1
        compared[name] = {
            "seq_len": record["seq_len"],
            "published": value,
            "measured": measured,
            "difference": difference,
            "agrees": abs(difference) <= TOLERANCE,
        }
        if abs(difference) > TOLERANCE:
            logger.warning(
                "the dense model's perplexity on %s is %.4f where %g is published (windows of %d tokens, %+.1f %%): "
                "text, tokenizer, revision or dtype are not those of the publication",
                name, measured, value, record["seq_len"], 100 * difference,
            )  # fmt: skip
    return compared
