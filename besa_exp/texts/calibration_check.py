"""Checks of a calibration set before any text, model or library is loaded."""

from __future__ import annotations

from pathlib import Path

from besa_exp.errors import ConfigurationError
from besa_exp.rules import broken_rules
from besa_exp.settings import CalibrationSettings
from besa_exp.texts.sources import check_source, is_token_file
from besa_exp.texts.token_files import token_file_shape


def check_calibration(settings: CalibrationSettings, context: int | None) -> list[str]:
    """What is wrong with these settings, in complete sentences, found without reading any text. `context` None: not
    known yet."""
    problems = broken_rules(settings, "calibration")
    source, key = (settings.path, "calibration.path") if settings.path else (settings.name, "calibration")
    if unreadable := check_source(source, key, "calibration", settings.column, settings.chat_template):
        return problems + unreadable
    seq_len, remedy = settings.seq_len, f"set calibration.seq_len={context} or less"
    if is_token_file(source):
        try:
            shape = token_file_shape(Path(source).expanduser())
        except ConfigurationError as error:
            return problems + list(error.problems)
        if len(shape) != 2:
            return [*problems, f"{key}={source}: input_ids has the shape {list(shape)}; it must be [sample, seq]"]
        if settings.chat_template:
            problems.append(f"calibration.chat_template=true: {key}={source} is exact tokens already; leave it out")
        seq_len, remedy = shape[1], "cut its rows"
        if seq_len < 2:
            problems.append(f"{key}={source}: its samples have one token each; give rows of two or more")
    if context is not None and seq_len > context:
        problems.append(
            f"{key}={source}: a window of {seq_len} tokens exceeds the model's context of {context}; {remedy}"
        )
    return problems
