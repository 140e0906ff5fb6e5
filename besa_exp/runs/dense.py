"""A run of the dense model: it is scored in a run folder as pruned ones are. No calibration, no block loop, no copy.

The model that was given is the model of the run; its zeros are counted as those of a pruned one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from besa_exp.blocks.reports import BlockReport, LinearReport, Size
from besa_exp.checkpoints.load import LoadedModel
from besa_exp.evaluation.policies import check_skips, skipping_of
from besa_exp.machine.environment import environment
from besa_exp.runs.results import counts_of, published
from besa_exp.runs.run import Run, load, model_facts, parameters, tokens_of, tracking
from besa_exp.runs.score import dense_scores, score


def dense_results(run: Run) -> tuple[dict[str, Any], Path]:
    """results.json but for times and memory, and the model's folder; with `evaluator.dense` the scores are shared with
    the runs beside it."""
    settings, loaded = run.settings, load(run, run.settings.model.path)
    reports, size = counted(loaded), parameters(loaded)
    run.folder.rewind(reports, scored=False)
    run.console.plan(settings, model_facts(loaded))
    results = counts_of(settings, reports, Size(size, size), environment(run.device))
    results |= {"model_notes": [*loaded.notes]} if loaded.notes else {}
    check_skips(loaded, settings.skipping)
    skipping = skipping_of(settings.skipping, lambda: tokens_of(settings, loaded))
    with tracking(run) as tracker:
        if settings.evaluator.dense:
            scores = dense_scores(run, loaded, skipping)
            run.folder.log_scores("pruned", scores)
        else:
            scores = score(run, "pruned", loaded, skipping)
        tracker.log_scores(scores, scores if settings.evaluator.dense else None)
    results |= scores.to_dict() | {"provenance": scores.provenance}
    results |= {"dense": scores.to_dict()} if settings.evaluator.dense else {}
    return results | published(settings, scores), loaded.folder


def counted(loaded: LoadedModel) -> list[BlockReport]:
    """Each block's weights and zeros as they are; its outputs are its targets, so that the losses are 0."""
    reports = []
    for block in loaded.resident():
        linears = (LinearReport.counted(name, linear.weight, 0.0) for name, linear in block.linears.items())
        reports.append(BlockReport(block.index, tuple(linears), 0.0, 0.0, 0.0))
    return reports
