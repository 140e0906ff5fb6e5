"""A run of the dense model: it is scored in a run folder as pruned ones are. No calibration, no block loop, no copy.

The model that was given is the model of the run; its zeros are counted as those of a pruned one.
"""

from __future__ import annotations

from typing import Any

import torch

from besa_exp.blocks.block import capture_blocks
from besa_exp.blocks.reports import BlockReport, LinearReport, Size
from besa_exp.checkpoints.load import LoadedModel
from besa_exp.machine.environment import environment
from besa_exp.runs.published import published
from besa_exp.runs.results import counts_of
from besa_exp.runs.run import Run, model_facts, parameters, tracking
from besa_exp.runs.score import dense_scores, score


def dense_results(run: Run, loaded: LoadedModel) -> dict[str, Any]:
    """results.json but for times and memory; with `evaluator.dense` the scores are shared with the runs beside it."""
    settings = run.settings
    reports, size = counted(loaded), parameters(loaded)
    run.folder.rewind(reports)
    run.console.plan(settings, model_facts(loaded))
    results = counts_of(settings, reports, Size(size, size), environment(run.device))
    results |= {"model_notes": [*loaded.notes]} if loaded.notes else {}
    with tracking(run) as tracker:
        if settings.evaluator.dense:
            scores = dense_scores(run, loaded)
            run.folder.log_scores("pruned", scores)
        else:
            scores = score(run, "pruned", loaded)
        tracker.log_scores(scores, scores if settings.evaluator.dense else None)
    results |= scores.to_dict() | {"provenance": scores.provenance}
    results |= {"dense": scores.to_dict()} if settings.evaluator.dense else {}
    return results | published(settings, scores)


def counted(loaded: LoadedModel) -> list[BlockReport]:
    """Each block's weights and zeros as they are; its outputs are its targets, so that the losses are 0."""
    blocks = capture_blocks(loaded.model, torch.zeros(1, 1, dtype=torch.long))  # never called: nothing is captured
    reports = []
    for block in loaded.weights.resident(blocks) if loaded.weights else blocks:
        linears = tuple(
            LinearReport(name, weight.numel(), weight.numel() - int(weight.bool().count_nonzero()), 0.0)
            for name, weight in ((name, linear.weight) for name, linear in block.linears.items())
        )
        reports.append(BlockReport(block.index, linears, 0.0, 0.0, 0.0))
    return reports
