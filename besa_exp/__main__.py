"""`python -m besa_exp` is `besa`; of several processes that torchrun starts, the first alone speaks."""

import os
import sys
from pathlib import Path
from typing import NoReturn

from besa_exp.main import main
from besa_exp.process import run_as_process
from besa_exp.torchrun import is_leader


def run() -> NoReturn:
    """The program `besa`."""
    if not is_leader():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    run_as_process(main)


if __name__ == "__main__":
    run()
