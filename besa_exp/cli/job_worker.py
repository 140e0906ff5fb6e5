"""`python -m besa_exp.cli.job_worker`: the process of one job of a sweep; see `job_process`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from omegaconf import DictConfig, OmegaConf

from besa_exp.cli.jobs import carry_out
from besa_exp.errors import Interrupted
from besa_exp.machine import atomic
from besa_exp.machine.process import run_as_process


def main() -> int:
    """Reads the job from standard input, carries it out and writes what became of it."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGUSR2, _interrupt)  # submitit's: the time is nearly up
    sys.argv = request["command"]
    config = OmegaConf.create(request["config"])
    assert isinstance(config, DictConfig)
    try:
        outcome = carry_out(config, request["pruner_name"], Path(request["folder"]))
    except KeyboardInterrupt:  # reported in the folder, and by the command that started this process
        return 130
    sys.stdout.flush()
    answer = {"status": outcome.status, "text": outcome.text, "missed": outcome.missed}
    atomic.write_text(Path(request["answer"]), json.dumps(answer))
    return outcome.exit_code


def _end_with_parent() -> None:
    """The parent never writes again: standard input ends when the parent does."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(signal.Signals(number).name)


if __name__ == "__main__":
    run_as_process(main)
