"""Models in other formats, converted to safetensors when the user asks for it (`model.convert=true`).

The result lies in `outputs/converted`, appears whole or not at all, and is used again as long as its sources stay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from besa_exp.errors import RunError
from besa_exp.machine import atomic

CONVERTED = Path("outputs") / "converted"


def converted_once(source: Path, files: Sequence[Path], write: Callable[[Path], None]) -> Path:
    """The folder that `write` fills, unless it is there: it is named after `source` and after the names, sizes and
    times of change of the `files` that it is made of. RunError: it cannot be written."""
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    digest = hashlib.sha256(json.dumps([str(source.resolve()), stamps]).encode()).hexdigest()
    target = CONVERTED / f"{source.resolve().name.removesuffix('.gguf')}-{digest[:12]}"
    if target.is_dir():
        return target
    try:
        with atomic.replaced_folder(target) as partial:
            write(partial)
    except OSError as error:
        raise RunError(
            f"{target} could not be written ({error}); free disk space, or run where outputs/ is writable"
        ) from error
    return target
