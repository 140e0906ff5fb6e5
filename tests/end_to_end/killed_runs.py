"""Starts one run again and again and kills it: a script for `run_ready`, because it must fork before torch has computed
anything.

    killed_runs.py RUN_FOLDER MOMENTS besa-arguments...

Each child is a `besa` process of its own, killed (SIGKILL) at its moment: MOMENTS is a JSON list of {after: seconds,
blocks: that many finished, scores: that many finished, generations: that many of a search finished, recovery: that many
states of a tuning kept after the first, structure: steps of a search for a structure, refined: blocks that a search
over the model has written, in_a_write: seen writing a file}, of which all given must hold.
Prints a JSON list of what was there at each kill. The run is left unfinished.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from besa_exp.cli.main import main


def start(arguments: list[str]) -> int:
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os._exit(main(arguments))
    return child


def kill(child: int, folder: Path, moment: dict) -> dict | None:
    """What was there when the run was killed; None: it had ended before. A look costs the run time where cores are few:
    no more is looked at than is asked for."""
    began = time.monotonic()
    asked = {name: count for name, count in moment.items() if name in LOOKS}
    writing = []
    while not (
        time.monotonic() - began >= moment.get("after", 0)
        and all(number(LOOKS[name](folder)) >= count for name, count in asked.items())
        and (not moment.get("in_a_write") or (writing := being_written(folder)))
    ):
        if os.waitpid(child, os.WNOHANG)[0]:
            return None
        time.sleep(0.0002 if moment.get("in_a_write") else 0.001)
    os.kill(child, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        return None
    return {name: look(folder) for name, look in LOOKS.items()} | {"writing": writing}


def number(found: list | int) -> int:
    return found if isinstance(found, int) else len(found)


def finished_blocks(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("blocks/??????.json")]


def being_written(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.rglob(".*.partial")]
    except FileNotFoundError:  # a folder went while it was looked into
        return []


def finished_scores(folder: Path) -> list[list[str]]:
    """The model and the set or task of each."""
    try:
        content = json.loads((folder / "scores.json").read_text())
    except FileNotFoundError:
        return []
    return [[which, name] for which, kinds in content.items() for kind in kinds.values() for name in kind]


def kept_states(folder: Path) -> int:
    """Of a recovery, over all attempts."""
    numbers = [0]
    for file in folder.glob("recovery/state-?.json"):
        with contextlib.suppress(FileNotFoundError):
            numbers.append(json.loads(file.read_text())["number"])
    return max(numbers)


def finished_generations(folder: Path) -> int:
    """Of the search for a budget."""
    try:
        return json.loads((folder / "blocks" / "budget_search.json").read_text())["generations"]
    except FileNotFoundError:
        return 0


def steps_of_structure(folder: Path) -> int:
    """Blocks that were removed, or steps of a policy gradient that were kept."""
    try:
        found = json.loads((folder / "structure_search.json").read_text())
    except FileNotFoundError:
        return 0
    return len(found["removals"]) if "removals" in found else found.get("step", 0)


def refined_blocks(folder: Path) -> int:
    return len(list(folder.glob("blocks/model/00000?.json")))


LOOKS = {
    "blocks": finished_blocks,
    "scores": finished_scores,
    "generations": finished_generations,
    "recovery": kept_states,
    "structure": steps_of_structure,
    "refined": refined_blocks,
}


def all_kills(folder: Path, moments: list[dict], arguments: list[str]) -> list[dict]:
    kills = []
    for moment in moments:
        seen, after = kill(start(arguments), folder, moment), moment.get("after", 0)
        while seen is None:  # it had ended before its moment: all that was made is needed again, and an earlier moment
            after /= 2
            seen = kill(start([*arguments, "overwrite=true"]), folder, moment | {"after": after})
        kills.append(seen)
    return kills


def kill_again_and_again() -> int:
    folder, moments, *arguments = sys.argv[1:]
    seen = all_kills(Path(folder), json.loads(moments), [*arguments, f"hydra.run.dir={folder}"])
    sys.stdout.write(json.dumps(seen) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(kill_again_and_again())
