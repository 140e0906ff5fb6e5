"""Kills one run again and again, then lets it finish: a script, because it forks before torch has computed anything.

    python killed_runs.py SEED KILLS SECONDS RUN_FOLDER besa-arguments...

Each child is a `besa` process of its own, killed (SIGKILL) at a random moment of the `SECONDS` a whole run takes, every
third one when it is seen writing a file. Prints a JSON list of what was there at each kill.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from besa_exp import jobs, preflight, run  # noqa: F401 - imported once, here, for all the children
from besa_exp.main import main


def start(arguments: list[str]) -> int:
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os._exit(main(arguments))
    return child


def kill(child: int, folder: Path, after: float, in_a_write: bool) -> str | None:
    """What the run was writing when it was killed, if anything; None: it had ended before."""
    deadline = time.monotonic() + after
    while True:
        writing = being_written(folder)
        if time.monotonic() > deadline and (writing or not in_a_write):
            break
        if os.waitpid(child, os.WNOHANG)[0]:
            return None
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return ", ".join(path.name for path in writing) or "nothing"


def being_written(folder: Path) -> list[Path]:
    try:
        return list(folder.rglob(".*.partial"))
    except FileNotFoundError:  # a folder went while it was looked into
        return []


def all_kills(seed: int, kills: int, seconds: float, folder: Path, arguments: list[str]) -> list[dict]:
    chance = random.Random(seed)
    seen: list[dict] = []
    while len(seen) < kills:
        child = start(arguments)
        writing = kill(child, folder, chance.uniform(0, seconds), in_a_write=len(seen) % 3 == 2)
        if writing is None:  # finished before its moment came: all that was made is needed again
            child = start([*arguments, "overwrite=true"])
            writing = kill(child, folder, chance.uniform(0, seconds / 2), in_a_write=False)
        finished = sorted(path.name for path in folder.glob("blocks/*.json") if path.name != "identity.json")
        seen.append({"writing": writing, "finished_blocks": len(finished)})
    return seen


if __name__ == "__main__":
    seed, kills, seconds, folder, *arguments = sys.argv[1:]
    seen = all_kills(int(seed), int(kills), float(seconds), Path(folder), arguments)
    _, status = os.waitpid(start(arguments), 0)
    sys.stdout.write(json.dumps(seen) + "\n")
    sys.exit(os.waitstatus_to_exitcode(status))
