"""Checks of a calibration set before any text, model or library is loaded."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from besa_exp.errors import ConfigurationError
from besa_exp.rules import broken_rules
from besa_exp.settings import CalibrationSettings
from besa_exp.texts.embedded.text import CALIBRATION_CHARACTERS
from besa_exp.texts.files import COMPRESSED, format_of
from besa_exp.texts.sources import EMBEDDED, check_source, is_token_file
from besa_exp.texts.token_files import token_file_shape

FAR_TOO_MANY = 10_000  # windows that take long to look for


def check_calibration(settings: CalibrationSettings, context: int | None) -> list[str]:
    """What is wrong with these settings, in complete sentences, found without reading any text. `context` None: not
    known yet."""
    problems = broken_rules(settings, "calibration")
    source, key = (settings.path, "calibration.path") if settings.path else (settings.name, "calibration")
    if unreadable := check_source(source, key, "calibration", settings.column, settings.chat_template):
        return problems + unreadable
    problems += _more_than_the_text(settings, source)
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


def check_asked_windows(settings: CalibrationSettings, asked: Collection[str]) -> list[str]:
    """What was asked for, by `num_samples` and `seq_len`, that a token file does not have: it is taken as it is."""
    if not settings.path or not is_token_file(settings.path):
        return []
    try:
        windows, seq_len = token_file_shape(Path(settings.path).expanduser())
    except (ConfigurationError, ValueError):  # check_calibration says it
        return []
    return [
        f"calibration.{key}={given}: {settings.path} has {windows} windows of {seq_len} tokens, and a token file is "
        "taken as it is; leave the key out, or write a file of other windows"
        for key, given, has in (("num_samples", settings.num_samples, windows), ("seq_len", settings.seq_len, seq_len))
        if key in asked and given != has
    ]


def _more_than_the_text(settings: CalibrationSettings, source: str) -> list[str]:
    """Of a text whose length is known unread: it has at most two tokens for each byte, the marks between documents
    among them. Some windows too many are refused when the text was read, which says how many it has."""
    path = Path(source).expanduser()
    if source == EMBEDDED:
        size = CALIBRATION_CHARACTERS
    elif format_of(path.name) == "plain" and path.suffix not in COMPRESSED:
        size = path.stat().st_size
    else:
        return []
    if settings.num_samples <= FAR_TOO_MANY or settings.num_samples * settings.seq_len <= 2 * size + 2:
        return []
    return [
        f"calibration.num_samples={settings.num_samples}: {source}, a text of {size:,} characters, cannot have so many "
        f"windows of {settings.seq_len} tokens; set less, or give more text"
    ]
