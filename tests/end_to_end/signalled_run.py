"""Runs a program that is sent a signal by itself: a script for `run_ready`.

    signalled_run.py SIGNAL FILE PROGRAM arguments...

The signal comes with the first that the main thread does after a file was renamed to one whose path ends with FILE: no
machine is too slow for that, nor too fast. A process that the program has forked sends it to its parent and waits for
what that makes of it.
"""

import os
import runpy
import sys
import threading
import time
from pathlib import Path

WAITS = 1000  # seconds


def signal_after(file: str, number: int) -> None:
    """By Python's own audit events, of which a rename is one."""
    first, moment = os.getpid(), "before"

    def watch(event: str, arguments: tuple) -> None:
        nonlocal moment
        if moment == "before" and event == "os.rename" and str(arguments[1]).endswith(file):
            moment = "now"
        elif moment == "now" and threading.current_thread() is threading.main_thread():
            moment = "after"
            if os.getpid() == first:
                os.kill(first, number)
            else:
                os.kill(os.getppid(), number)
                time.sleep(WAITS)

    sys.addaudithook(watch)


if __name__ == "__main__":
    number, file, program, *words = sys.argv[1:]
    sys.argv = [str(Path(__file__).parent / program), *words]
    signal_after(file, int(number))
    runpy.run_path(sys.argv[0], run_name="__main__")
