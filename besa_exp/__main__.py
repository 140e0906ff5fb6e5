"""`python -m besa_exp` is `besa`; of several processes that torchrun starts, the first alone speaks."""

from typing import NoReturn

from besa_exp.cli.main import main
from besa_exp.machine.process import only_the_leader_speaks, run_as_process


def run() -> NoReturn:
    """The program `besa`."""
    only_the_leader_speaks()
    run_as_process(main)


if __name__ == "__main__":
    run()
