"""The content of results.json, from what a run measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from besa_exp.blocks.reports import BlockReport, Size, share_of_zeros
from besa_exp.evaluation.score import Scores
from besa_exp.presets import METHOD_GROUPS
from besa_exp.run_folder.status import now, read_status
from besa_exp.runs.run import Work, weights_in_linears
from besa_exp.settings import RunSettings
from besa_exp.tensors.masks import Goal
from besa_exp.texts.calibration import Calibration

TOLERANCE = 0.01  # relative, between a published perplexity of a dense model and a measured one
SCHEMA = 1  # of results.json: goes up when a key is renamed or means something else
logger = logging.getLogger(__name__)


def results_of(settings: RunSettings, work: Work, environment: Mapping[str, Any]) -> dict[str, Any]:
    """results.json without times and memory, as far as the stages have come; blocks under their numbers in the dense
    model. `structure` and `recovery` stand in it where there were such stages."""
    values = counts_of(settings, work.numbered(work.reports), work.parameters, environment)
    values |= {
        "target_sparsity": 0.0 if settings.keeps_weights else Goal.parse(settings.sparsity, settings.pattern).sparsity,
        "calibration": _calibration(work.calibration),
    }
    if settings.ignore:  # the linears listed are not all
        values["weights_in_blocks"] = weights_in_linears(work.loaded)
    values |= {"model_notes": [*work.loaded.notes]} if work.loaded.notes else {}
    values |= {"structure": work.structure.to_dict()} if work.structure else {}
    values |= {"recovery": work.recovery.to_dict()} if work.recovery else {}
    dense, scores = work.dense_scores, work.scores
    values |= {"dense": dense.to_dict()} if dense else {}
    values |= {"before": work.scores_before.to_dict()} if work.scores_before else {}
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
    return {
        "schema": SCHEMA,
        "model": settings.model.path,
        "model_name": settings.model.name,
        **({"model_revision": settings.model.revision} if settings.model.revision else {}),
        "pruner": settings.pruner_name,
        **parts_of(settings),
        "pattern": settings.pattern,
        **({"ignore": [*settings.ignore]} if settings.ignore else {}),
        "seed": settings.seed,
        "target_sparsity": 0.0,
        "measured_sparsity": share_of_zeros(linears),
        "parameters": asdict(parameters),
        "linears": len(linears),
        "quantisation": asdict(quantiser) if (quantiser := settings.pruner.traits.quantiser) else None,
        "blocks": [report.to_dict() for report in reports],
        "calibration": None,
        "environment": environment,
    }


def parts_of(settings: RunSettings) -> dict[str, str | None]:
    """`method`, the names of all its parts, and `budget` and `update` by themselves, None where there is none. What a
    structure and a recovery did stands under their own keys."""
    groups = [group for group in METHOD_GROUPS if getattr(settings, group) is not None]
    names = dict(zip(groups, settings.pruner_name.split("+"), strict=False))
    return {"method": settings.pruner_name} | {group: names.get(group) for group in ("budget", "update")}


def attempt_of(folder: Path) -> dict[str, Any]:
    """The command of the run in `folder`, when its last attempt began, and when it ends: now."""
    status = read_status(folder) or {}
    return {"command": status.get("command"), "started": status.get("started"), "finished": now()}


def _calibration(calibration: Calibration) -> dict[str, Any]:
    samples, length = calibration.input_ids.shape
    return {
        "name": calibration.name,
        "num_samples": samples,
        "seq_len": length,
        "tokens_sha256": calibration.tokens_sha256,
        "provenance": calibration.provenance,
    }


def published(settings: RunSettings, dense: Scores | None) -> dict[str, Any]:
    """The part of results.json that compares the dense model's perplexities with the published ones."""
    compared = compared_with_published(settings.model.published_perplexity, dense) if dense else {}
    return {"published": compared} if compared else {}


def compared_with_published(published: Mapping[str, Mapping[int, float]], dense: Scores) -> dict[str, dict[str, Any]]:
    """{set: {seq_len, published, measured, difference (relative), agrees}} for what was published and measured in the
    same window; a warning in the log for each that does not agree."""
    compared = {}
    for name, by_window in published.items():
        score = next(iter(dense.named("perplexity", name)), None)
        seq_len = score.conditions.get("seq_len", 0) if score else 0
        value = by_window.get(seq_len)
        if score is None or score.value is None or value is None or "max_windows" in score.conditions:
            continue
        measured = score.value
        difference = measured / value - 1
        compared[name] = {
            "seq_len": seq_len,
            "published": value,
            "measured": measured,
            "difference": difference,
            "agrees": abs(difference) <= TOLERANCE,
        }
        if abs(difference) > TOLERANCE:
            logger.warning(
                "the dense model's perplexity on %s is %.4f where %g is published (windows of %d tokens, %+.1f %%): "
                "text, tokenizer, revision or dtype are not those of the publication",
                name, measured, value, seq_len, 100 * difference,
            )  # fmt: skip
    return compared
