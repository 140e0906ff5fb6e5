"""The check of a saved model without a process of its own, which takes longer to start than a small run lasts. The
process itself is tested in test_reloading.py and by runs that leave it in place."""

from __future__ import annotations

import io
import json
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from besa_exp.checkpoints import fresh_process


class Here:
    """Stands for the process: answers the request that it was given on its standard input."""

    returncode = 0

    def __init__(self, command: list[str], **_: Any):
        assert command[1:] == ["-m", fresh_process.__name__]
        self.stdin = io.StringIO()

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def communicate(self) -> tuple[str, str]:
        return json.dumps(fresh_process.reloaded(json.loads(self.stdin.getvalue()))), ""

    def kill(self) -> None:
        self.stdin.close()


def reload_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved models are loaded in this process until the test ends."""
    monkeypatch.setattr(fresh_process, "subprocess", SimpleNamespace(Popen=Here, PIPE=subprocess.PIPE))
