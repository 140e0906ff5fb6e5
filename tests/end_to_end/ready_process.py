"""Runs programs in processes that have torch, transformers and lm-eval already: a server imports them once and forks
for each.

A program here must not need what is read when they are imported (environment variables, above all) to differ from the
server's."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import besa_exp

BESA = str(Path(besa_exp.__file__).parent / "__main__.py")
TIMEOUT = 1800  # seconds, for a machine that is ten times as slow; what hangs alone takes as long
# The parent's WANDB_SERVICE is its own: it would outlive killed runs and hold them.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


@dataclass(frozen=True)
class Ready:
    """A process that was started; the server starts one at a time."""

    pid: int
    words: list[str]
    said: Any  # an open file

    def ended(self) -> bool:
        """Whether it has."""
        return bool(select.select([said_by_server()], [], [], 0)[0])

    def wait(self) -> subprocess.CompletedProcess[str]:
        """How it ended, and all that it said."""
        answers = said_by_server()
        assert select.select([answers], [], [], TIMEOUT)[0], f"{self.words} did not end: {self.said.read()}"
        with self.said:
            return subprocess.CompletedProcess(self.words, int(answers.readline()), self.said.read())


@cache
def server() -> subprocess.Popen[bytes]:
    """Ends when this process does: its standard input is then closed."""
    command = [sys.executable, __file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=ENVIRONMENT)


def said_by_server() -> IO[bytes]:
    """A line for a process that was started, and one when it has ended."""
    pipe = server().stdout
    assert pipe is not None
    return pipe


def start_ready(program: str, *arguments: str, output: str | None = None) -> Ready:
    """`python PROGRAM ARGUMENTS...` in this working folder and a session of its own, its two streams together; PROGRAM
    is `BESA` or a script of this folder. `output`: the file that is its standard output instead, or `closed`."""
    ready, said = server(), tempfile.NamedTemporaryFile("w+", suffix=".txt")  # noqa: SIM115 - `wait` closes it
    assert ready.stdin is not None
    words = [str(Path(__file__).parent / program), *arguments]
    request = {"words": words, "folder": str(Path.cwd()), "said": said.name, "output": output}
    ready.stdin.write(json.dumps(request).encode() + b"\n")
    return Ready(int(said_by_server().readline()), words, said)


def run_ready(program: str, *arguments: str, output: str | None = None) -> subprocess.CompletedProcess[str]:
    """The same, when it has ended."""
    return start_ready(program, *arguments, output=output).wait()


def serve() -> int:
    """Forks for each request, with the embedded text read; answers with the process and then, when it ends, with its
    exit code."""
    from besa_exp.cli import jobs, preflight, prune  # noqa: F401
    from besa_exp.evaluation import zero_shot  # noqa: F401
    from besa_exp.machine.process import imports_are_done
    from besa_exp.methods.pruners import besa, uniform  # noqa: F401
    from besa_exp.runs import evaluate  # noqa: F401
    from besa_exp.runs import prune as pruning  # noqa: F401
    from besa_exp.texts.embedded.continuations import continuation_items

    imports_are_done()
    continuation_items()
    for line in sys.stdin:
        request = json.loads(line)
        if child := os.fork():
            os.write(1, f"{child}\n".encode())
            os.write(1, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
            continue
        become(request)
    return 0


def become(request: dict[str, Any]) -> None:
    """This process is that of the request; ends with its program."""
    import runpy

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    os.chdir(request["folder"])
    said = os.open(request["said"], os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 2)
    if request["output"] == "closed":
        os.close(1)
        sys.stdout = None  # type: ignore[assignment] # as an interpreter that starts has it
    else:
        os.dup2(os.open(request["output"], os.O_WRONLY) if request["output"] else said, 1)
    sys.argv = request["words"]
    runpy.run_path(sys.argv[0], run_name="__main__")
    raise AssertionError("the program ends by itself")


if __name__ == "__main__":
    from besa_exp.machine.process import run_as_process

    run_as_process(serve)
