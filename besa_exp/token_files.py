"""What a file of exact token ids says about itself before any id is read. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from besa_exp.errors import ConfigurationError

TOKENS_KEY = "input_ids"


def token_file_shape(path: Path) -> tuple[int, ...]:
    """The shape of `input_ids`, read from the header alone. ConfigurationError: not such a file."""
    rule = f"a token file is a safetensors file whose {TOKENS_KEY!r} holds whole numbers [sample, seq]"
    try:
        with safe_open(path, framework="numpy") as file:
            if TOKENS_KEY not in file.keys():  # noqa: SIM118, the file is no mapping
                raise ConfigurationError(f"{path}: holds {', '.join(file.keys()) or 'nothing'}; {rule}")
            entry = file.get_slice(TOKENS_KEY)
            shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{path}: cannot be read ({error}); {rule}") from error
    if dtype[0] not in "IU" or len(shape) not in (1, 2) or 0 in shape:
        raise ConfigurationError(f"{path}: {TOKENS_KEY!r} has the type {dtype} and the shape {list(shape)}; {rule}")
    return shape
