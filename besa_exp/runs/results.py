"""The content of results.json, from what a run measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from besa_exp.blocks.reports import BlockReport, Size
from besa_exp.runs.published import published
from besa_exp.runs.run import Work
from besa_exp.settings import RunSettings
from besa_exp.tensors.masks import Goal
from besa_exp.texts.calibration import Calibration


def results_of(settings: RunSettings, work: Work, environment: Mapping[str, Any]) -> dict[str, Any]:
    """results.json without times and memory, as far as the stages have come; blocks under their numbers in the dense
    model. `structure` and `recovery` stand in it where there were such stages."""
    values = counts_of(settings, work.numbered(work.reports), work.parameters, environment)
    values |= {
        "target_sparsity": 0.0 if settings.keeps_weights else Goal.parse(settings.sparsity, settings.pattern).sparsity,
        "calibration": _calibration(work.calibration),
    }
    values |= {"model_notes": [*work.loaded.notes]} if work.loaded.notes else {}
    values |= {"structure": work.structure.to_dict()} if work.structure else {}
    values |= {"recovery": work.recovery.to_dict()} if work.recovery else {}
    dense, scores = work.dense_scores, work.scores
    values |= {"dense": dense.to_dict()} if dense else {}
    if scores:
        values |= {**scores.to_dict(), "provenance": scores.provenance, **work.reloaded}
        values |= {"cost": {**values["cost"], "dense": work.dense_cost}} if work.dense_cost and scores.cost else {}
        is_dense = values["measured_sparsity"] == 0 and not work.structure
        values |= published(settings, dense or (scores if is_dense else None))
    return values


def counts_of(
    settings: RunSettings, reports: Sequence[BlockReport], parameters: Size, environment: Mapping[str, Any]
) -> dict[str, Any]:
    """What was asked, and what the blocks' linears hold; of a dense model there is no target."""
    linears = [linear for report in reports for linear in report.linears]
    weights, pruned = sum(linear.weights for linear in linears), sum(linear.pruned for linear in linears)
    return {
        "model": settings.model.path,
        "pruner": settings.pruner_name,
        "pattern": settings.pattern,
        "seed": settings.seed,
        "target_sparsity": 0.0,
        "measured_sparsity": pruned / weights,
        "parameters": asdict(parameters),
        "linears": len(linears),
        "quantisation": asdict(quantiser) if (quantiser := settings.pruner.traits.quantiser) else None,
        "blocks": [report.to_dict() for report in reports],
        "calibration": None,
        "environment": environment,
    }


def _calibration(calibration: Calibration) -> dict[str, Any]:
    samples, length = calibration.input_ids.shape
    return {
        "name": calibration.name,
        "num_samples": samples,
        "seq_len": length,
        "tokens_sha256": calibration.tokens_sha256,
        "provenance": calibration.provenance,
    }
