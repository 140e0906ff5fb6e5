"""The stages that score: the dense model, shared with the runs beside it, the one that a recovery is about to tune, and
the one that is left."""

from __future__ import annotations

from dataclasses import replace

from besa_exp.checkpoints.load import LoadedModel
from besa_exp.evaluation.kept_scores import FOLDER as DENSE_SCORES
from besa_exp.evaluation.kept_scores import FinishedScores, dense_key, shared_dense_scores
from besa_exp.evaluation.policies import Skipping, skipping_of
from besa_exp.evaluation.score import Scores
from besa_exp.evaluation.scores import evaluate
from besa_exp.machine import distributed
from besa_exp.runs.run import Run, Work
from besa_exp.runs.save import reread


def score_dense(run: Run, work: Work) -> Work:
    """The stage: the dense model's scores, where they are asked for."""
    if not run.settings.evaluator.dense:
        return work
    return replace(work, dense_scores=dense_scores(run, work.loaded, _skipping(run, work)))


def score_untuned(run: Run, work: Work) -> Work:
    """The stage: the scores of the model that a recovery is about to tune."""
    if run.settings.recovery is None:
        return work
    return replace(work, scores_before=score(run, "before", work.loaded, _skipping(run, work)))


def score_pruned(run: Run, work: Work) -> Work:
    """The stage: the scores of the model as it was saved, while a fresh process reads it too."""
    assert work.saved is not None
    with reread(run, work) as reloaded:
        scores = score(run, "pruned", work.saved, _skipping(run, work))
        seen = reloaded()
    run.tracker.log_scores(scores, work.dense_scores, work.scores_before)
    return replace(work, scores=scores, reloaded=seen)


def _skipping(run: Run, work: Work) -> Skipping | None:
    return skipping_of(run.settings.skipping, lambda: work.calibration.input_ids)


def dense_scores(run: Run, loaded: LoadedModel, skipping: Skipping | None = None) -> Scores:
    """The dense model's scores, measured once for all runs beside this one."""
    if distributed.num_ranks() > 1:  # one process locks the shared scores, and all ranks are needed to measure them
        return score(run, "dense", loaded, skipping)
    settings, console = run.settings, run.console
    under = skipping.request if skipping else None
    key = dense_key(loaded, settings.evaluator, settings.seed, settings.deterministic, run.device, under)
    scores, known = shared_dense_scores(
        run.folder.path.parent / DENSE_SCORES,
        key,
        lambda: score(run, "dense", loaded, skipping),
        lambda: console.stage("dense model: waiting for another run that scores it"),
    )
    if known:
        console.stage("dense model: scores reused from a run beside this one")
        run.folder.log_scores("dense", scores)
    return scores


def score(run: Run, which: str, loaded: LoadedModel, skipping: Skipping | None = None) -> Scores:
    """Scores of the dense or the pruned model, recorded in metrics.jsonl as soon as they are known."""
    settings, console = run.settings, run.console
    asked = {"model": [settings.model.path, settings.model.revision], "dtype": str(loaded.model.dtype)}
    earlier = FinishedScores(run.folder.scores, which, run.spent.keep, asked)

    name = "model before tuning" if which == "before" else f"{which} model"

    def on_progress(text: str) -> None:
        console.stage(f"{name}: {text}")

    with run.spent.timed("evaluate"):
        scores = evaluate(
            loaded, settings.evaluator, settings.offline, settings.seed, on_progress, earlier, console.count, skipping
        )
    run.folder.log_scores(which, scores)
    return scores
