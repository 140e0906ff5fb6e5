"""Models in other formats, converted to safetensors when the user asks for it (`model.convert=true`).

The result lies in `outputs/converted`, appears whole or not at all, and is used again as long as its sources stay. Of
several runs that ask for it one makes it, and the others wait."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from besa_exp.errors import RunError
from besa_exp.machine import atomic

CONVERTED = Path("outputs") / "converted"
LOCK = Path("outputs") / ".converted.lock"
logger = logging.getLogger(__name__)


def converted_once(source: Path, files: Sequence[Path], write: Callable[[Path], None]) -> Path:
    """The folder that `write` fills, unless it is there: it is named after `source` and after the names, sizes and
    times of change of the `files` that it is made of. RunError: it cannot be written."""
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    digest = hashlib.sha256(json.dumps([str(source.resolve()), stamps]).encode()).hexdigest()
    target = CONVERTED / f"{source.resolve().name.removesuffix('.gguf')}-{digest[:12]}"
    try:
        with atomic.alone(LOCK, lambda: logger.info("%s: another run converts a model; waiting for it", source)):
            if not target.is_dir():
                with atomic.replaced_folder(target) as partial:
                    write(partial)
    except OSError as error:
        raise RunError(
            f"{target} could not be written ({error}); free disk space, or run where outputs/ is writable"
        ) from error
    return target
