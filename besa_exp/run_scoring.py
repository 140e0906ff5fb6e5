"""The scores of a run: the dense model's, shared with the runs beside it, the pruned one's, and what was published."""

from __future__ import annotations

from typing import Any

from besa_exp import distributed
from besa_exp.dense_scores import FOLDER as DENSE_SCORES
from besa_exp.dense_scores import dense_key, shared_dense_scores
from besa_exp.evaluation.finished_scores import FinishedScores
from besa_exp.evaluation.scores import Scores, evaluate
from besa_exp.models import LoadedModel
from besa_exp.published import compared_with_published
from besa_exp.running import Run
from besa_exp.settings import RunSettings


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
        console.stage("dense model: scored before by another run")
        run.folder.log_scores("dense", scores)
    return scores


def score(run: Run, which: str, loaded: LoadedModel) -> Scores:
    """Scores of the dense or the pruned model, recorded in metrics.jsonl as soon as they are known."""
    settings, console = run.settings, run.console
    earlier = FinishedScores(run.folder.scores, which, run.spent.keep)

    def on_progress(text: str) -> None:
        console.stage(f"{which} model: {text}")

    with run.spent.timed("evaluate"):
        scores = evaluate(loaded, settings.evaluator, settings.offline, settings.seed, on_progress, earlier)
    run.folder.log_scores(which, scores)
    return scores


def published(settings: RunSettings, dense: Scores | None) -> dict[str, Any]:
    """The part of results.json that compares the dense model's perplexities with the published ones."""
    compared = compared_with_published(settings.model.published_perplexity, dense) if dense else {}
    return {"published": compared} if compared else {}
