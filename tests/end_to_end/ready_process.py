"""Runs scripts in processes that have torch and transformers already: a server imports them once and forks for each.

A script here must not need what is read when they are imported (environment variables, above all) to differ from the
server's."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

TIMEOUT = 600  # seconds
# The parent's WANDB_SERVICE is its own: it would outlive killed runs and hold them.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


@cache
def server() -> subprocess.Popen[str]:
    """Ends when this process does: its standard input is then closed."""
    command = [sys.executable, __file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def run_ready(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT ARGUMENTS...`, a script of this folder, in this working folder; its two streams together."""
    ready = server()
    assert ready.stdin is not None
    assert ready.stdout is not None
    with tempfile.NamedTemporaryFile("w+", suffix=".txt") as said:
        words = [str(Path(__file__).parent / script), *arguments]
        request = {"words": words, "folder": str(Path.cwd()), "said": said.name}
        ready.stdin.write(json.dumps(request) + "\n")
        ready.stdin.flush()
        assert select.select([ready.stdout], [], [], TIMEOUT)[0], f"{script} {arguments} did not end: {said.read()}"
        return subprocess.CompletedProcess(words, int(ready.stdout.readline()), said.read())


def serve() -> int:
    """Forks for each request; answers with the exit code."""
    import runpy

    from besa_exp.machine.process import imports_are_done
    from besa_exp.runs import evaluate as evaluation_run  # noqa: F401

    imports_are_done()
    for line in sys.stdin:
        request = json.loads(line)
        if child := os.fork():
            sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
            sys.stdout.flush()
            continue
        os.chdir(request["folder"])
        streams = os.open(request["said"], os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(streams, stream.fileno())
        sys.argv = request["words"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        raise AssertionError("the script ends by itself")
    return 0


if __name__ == "__main__":
    from besa_exp.machine.process import run_as_process

    run_as_process(serve)
