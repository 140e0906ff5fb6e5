"""What a file of exact token ids says about itself before any id is read. Nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from besa_exp.errors import ConfigurationError

TOKENS_KEY = "input_ids"
MASK_KEY = "attention_mask"


def token_file_shape(path: Path) -> tuple[int, ...]:
    """The shape of `input_ids`, read from the header alone. ConfigurationError: it is no token file, or has tensors
    that would be ignored. A mask is allowed if it is all ones, which changes nothing."""
    rule = f"a token file is a safetensors file whose {TOKENS_KEY!r} holds whole numbers [sample, seq]"
    try:
        with safe_open(path, framework="numpy") as file:
            if TOKENS_KEY not in file.keys():  # noqa: SIM118, the file is no mapping
                raise ConfigurationError(f"{path}: holds {', '.join(file.keys()) or 'nothing'}; {rule}")
            entry = file.get_slice(TOKENS_KEY)
            shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
            unused = [name for name in file.keys() if name not in (TOKENS_KEY, MASK_KEY)]  # noqa: SIM118
            masked = MASK_KEY in file.keys() and not bool(file.get_tensor(MASK_KEY).all())  # noqa: SIM118
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a mask in a format that numpy lacks
        raise ConfigurationError(f"{path}: cannot be read ({error}); {rule}") from error
    if dtype[0] not in "IU" or len(shape) not in (1, 2) or 0 in shape:
        raise ConfigurationError(f"{path}: {TOKENS_KEY!r} has the type {dtype} and the shape {list(shape)}; {rule}")
    if masked:
        raise ConfigurationError(
            f"{path}: its {MASK_KEY!r} leaves tokens out, and every token here counts; cut or pack the rows so that "
            f"none is padding, and save {TOKENS_KEY!r} alone"
        )
    if unused:
        raise ConfigurationError(
            f"{path}: holds {', '.join(unused)} beside {TOKENS_KEY!r}, which is not used; save {TOKENS_KEY!r} alone"
        )
    return shape
