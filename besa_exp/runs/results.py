"""The content of results.json, from what a run measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from besa_exp.blocks.reports import BlockReport
from besa_exp.evaluation.scores import Scores
from besa_exp.settings import RunSettings
from besa_exp.tensors.masks import Goal
from besa_exp.texts.calibration import Calibration


def results_of(
    settings: RunSettings,
    calibration: Calibration | None,
    reports: Sequence[BlockReport],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """results.json without scores, times and memory. `calibration` None: of a dense model, which has no target."""
    linears = [linear for report in reports for linear in report.linears]
    weights, pruned = sum(linear.weights for linear in linears), sum(linear.pruned for linear in linears)
    return {
        "model": settings.model.path,
        "pruner": settings.pruner_name,
        "pattern": settings.pattern,
        "seed": settings.seed,
        "target_sparsity": Goal.parse(settings.sparsity, settings.pattern).sparsity if calibration else 0.0,
        "measured_sparsity": pruned / weights,
        "linears": len(linears),
        "quantisation": asdict(quantiser) if (quantiser := settings.pruner.traits.quantiser) else None,
        "blocks": [_block(report) for report in reports],
        "calibration": _calibration(calibration) if calibration else None,
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


def _block(report: BlockReport) -> dict[str, Any]:
    return {
        "index": report.index,
        "reconstruction_loss": {"before": report.loss_before, "after": report.loss_after},
        "seconds": report.seconds,
        "linears": {
            linear.name: {"weights": linear.weights, "pruned": linear.pruned, "sparsity": linear.sparsity}
            for linear in report.linears
        },
    }


def score_values(scores: Scores) -> dict[str, Any]:
    """The part of results.json that one model's scores are."""
    values = {"perplexity": scores.perplexity, "zero_shot": scores.zero_shot, "unavailable": scores.unavailable}
    values |= {"simulated_speed": scores.simulated_speed} if scores.simulated_speed else {}
    return values | ({"speed": scores.speed} if scores.speed else {})
