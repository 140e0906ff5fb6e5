"""The scores that a run has finished, kept on the disk one by one, so that an evaluation goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from besa_exp.machine import atomic, distributed


@dataclass(frozen=True)
class FinishedScores:
    """scores.json of a run folder: {which model: {kind: {set or task: request and result}}}. Of several ranks the first
    reads it for all, and writes it. `keep_spent` is called before each score is kept."""

    path: Path
    which: str
    keep_spent: Callable[[], None] = lambda: None

    def find(self, kind: str, name: str, request: dict[str, Any]) -> Any | None:
        """What was measured under the same `request`; None: nothing."""
        found = distributed.from_first(lambda: self._read().get(self.which, {}).get(kind, {}).get(name))
        return found["result"] if found and found["request"] == json.loads(json.dumps(request)) else None

    def keep(self, kind: str, name: str, request: dict[str, Any], result: Any) -> None:
        """Remember one set's or task's result."""
        if not distributed.is_first():
            return
        content = self._read()
        content.setdefault(self.which, {}).setdefault(kind, {})[name] = {"request": request, "result": result}
        self.keep_spent()
        atomic.write_text(self.path, json.dumps(content) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
