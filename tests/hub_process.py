"""The stand-in hub of `hub_server.py` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hub_of(root: Path) -> Iterator[str]:
    """The address of a hub that serves `root` and takes pushes into it."""
    command = [sys.executable, str(Path(__file__).with_name("hub_server.py")), str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()
