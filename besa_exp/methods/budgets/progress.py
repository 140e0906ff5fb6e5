"""How far a search has come, on the disk, so that a run that was killed goes on with it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from besa_exp.errors import RunError
from besa_exp.machine import atomic, distributed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What a search has found so far, in one file that is whole at any time; None: it is kept nowhere. `keep_spent` is
    called before it is written."""

    file: Path | None = None
    keep_spent: Callable[[], None] = lambda: None

    def read(self) -> dict[str, Any]:
        """What was written last, on every rank; empty: nothing was, or it cannot be read: the search starts over."""
        return distributed.from_first(self._read)

    def write(self, found: Mapping[str, Any]) -> None:
        """Keep `found` instead of what there is. RunError: it is no JSON; the disk is full or cannot be written to."""
        if self.file is None or not distributed.is_first():
            return
        try:
            text = json.dumps(found) + "\n"
        except (TypeError, ValueError) as error:
            raise RunError(f"a search keeps plain values ({error}); give tensors as .tolist() makes them") from error
        remedy = "free disk space, then run the same command again"
        with atomic.writing(f"the search could not be written to {self.file}", remedy):
            self.keep_spent()
            atomic.write_text(self.file, text)

    def _read(self) -> dict[str, Any]:
        if self.file is None or not self.file.is_file():
            return {}
        try:
            return json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            logger.warning("the search starts again: %s is damaged (%s)", self.file, error)
            return {}
