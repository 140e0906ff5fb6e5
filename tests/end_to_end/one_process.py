"""Several commands in one fresh process, whose environment is read when its libraries are imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAM = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
import huggingface_hub.constants
from besa_exp.cli.main import main
for hub, words in json.loads(sys.stdin.read()):
    huggingface_hub.constants.ENDPOINT = hub
    with redirect_stdout(StringIO()) as said, redirect_stderr(said):
        code = main(words)
    print(json.dumps([code, said.getvalue()]))
"""


def answers(
    commands: Sequence[tuple[str, Sequence[str]]], environment: Mapping[str, str], folder: Path | None = None
) -> list[tuple[int, str]]:
    """Exit code and all that was said of each command, given as the hub's address and its words."""
    asked = {"input": json.dumps(commands), "cwd": folder, "env": environment, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, **asked)
    assert done.returncode == 0, done.stderr
    return [(code, said) for code, said in map(json.loads, done.stdout.splitlines())]
