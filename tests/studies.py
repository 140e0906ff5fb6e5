"""The code of the studies under experiments/, whose modules have names that others have too."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def collect_of(study: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `collect` of a study, with those beside it, which it alone sees."""
    folder = EXPERIMENTS / study
    monkeypatch.syspath_prepend(str(folder))
    beside = [path.stem for path in folder.glob("*.py")]
    hidden = {name: sys.modules.pop(name) for name in beside if name in sys.modules}
    module: ModuleType = importlib.import_module("collect")
    for name in beside:
        sys.modules.pop(name, None)
    sys.modules.update(hidden)
    return module


def records_of(study: str) -> list[dict[str, Any]]:
    """What its results.json holds."""
    return json.loads((EXPERIMENTS / study / "results.json").read_text(encoding="utf-8"))
