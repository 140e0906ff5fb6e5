"""Several commands in one fresh process, whose environment is read when its libraries are imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ready_process import TIMEOUT

PROGRAM = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
import huggingface_hub.constants
from besa_exp.cli.main import main
from besa_exp.machine.process import run_as_process
def answer():
    for hub, words in json.loads(sys.stdin.read()):
        huggingface_hub.constants.ENDPOINT = hub
        with redirect_stdout(StringIO()) as said, redirect_stderr(said):
            code = main(words)
        print(json.dumps([code, said.getvalue()]))
    return 0
run_as_process(answer)
"""


def answers(
    commands: Sequence[tuple[str, Sequence[str]]], environment: Mapping[str, str], folder: Path | None = None
) -> list[tuple[int, str]]:
    """Exit code and all that was said of each command, given as the hub's address and its words."""
    asked = {"input": json.dumps(commands), "cwd": folder, "env": environment, "timeout": TIMEOUT}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, **asked)
    assert done.returncode == 0, done.stderr
    return [(code, said) for code, said in map(json.loads, done.stdout.splitlines())]
