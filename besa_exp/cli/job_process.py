"""A job of a sweep in a process of its own, whatever the launcher: one that is killed takes no other with it, its
memory is measured by itself and is free when it ends.

`run_apart` starts `besa_exp.cli.job_worker` and gives it the job in a line of JSON. The pipe stays open: the worker
ends when it breaks, so that no job outlives the command that asked for it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from besa_exp.display.console import JOB_OF_SWEEP
from besa_exp.errors import RunError
from besa_exp.runs.interruption import interruptible

WORKER = "besa_exp.cli.job_worker"
PATIENCE = 60  # seconds that a worker has to put its work away


def run_apart(
    config: Mapping[str, Any], pruner_name: str, folder: Path, command: Sequence[str], label: str, gpu: str | None
) -> dict[str, Any]:
    """What became of the job, as the worker reports it: {status, text, missed}. RunError: the process ended without a
    word.

    `config` is the resolved configuration, `command` what a person would type for it. With a `label` each line that
    the worker prints begins with it; without one it has the terminal for itself."""
    with tempfile.TemporaryDirectory(prefix="besa-") as place:
        answer = Path(place, "answer.json")
        request = {
            "config": config,
            "pruner_name": pruner_name,
            "folder": str(folder),
            "command": list(command),
            "answer": str(answer),
        }
        own = {JOB_OF_SWEEP: "1"} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        code = _run(json.dumps(request), label, os.environ | own)
        if answer.is_file():
            return json.loads(answer.read_text(encoding="utf-8"))
    raise RunError(_ended(code))


def _run(request: str, label: str, environment: Mapping[str, str]) -> int:
    """The exit code. Under submitit signals are left to submitit, which queues the job again."""
    output, errors = (subprocess.PIPE, subprocess.STDOUT) if label else (None, None)
    with interruptible() if "SUBMITIT_EXECUTOR" not in os.environ else nullcontext():
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            env=environment,
            text=True,
        )
        assert process.stdin is not None
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            for line in process.stdout or ():
                sys.stdout.write(f"{label}{line}")
                sys.stdout.flush()
            return process.wait()
        except BrokenPipeError:  # it ended before it had read the request
            return process.wait()
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in filter(None, (process.stdin, process.stdout)):
        try:
            pipe.close()
        except BrokenPipeError:  # what was not read by the worker
            continue


def _ended(code: int) -> str:
    on = "; run the same command again to resume after what is finished"
    if code == 128 + signal.SIGTERM:
        return f"the job was interrupted{on}"
    if code >= 0:
        return f"the job's process ended with exit code {code} and left no error; see what it printed{on}"
    name = signal.Signals(-code).name
    cause = " (most often because the machine or its limit ran out of memory)" if -code == signal.SIGKILL else ""
    remedy = "run fewer jobs at once (hydra.launcher.n_jobs=1 with joblib) or set model.load=streamed activations=disk"
    return f"the job's process was ended by {name}{cause}: {remedy}{on}"
