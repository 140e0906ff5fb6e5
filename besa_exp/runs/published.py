"""Perplexities of the dense model that others have published, beside those measured here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from besa_exp.evaluation.score import Scores
from besa_exp.settings import RunSettings

TOLERANCE = 0.01  # relative, between a published and a measured perplexity
logger = logging.getLogger(__name__)


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
