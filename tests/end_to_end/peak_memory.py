"""How much a run's memory grows over what its process has when it begins: a script for `run_ready`.

peak_memory.py besa-arguments...
"""

import resource
import sys

import torch

from besa_exp.cli.main import main


def grown() -> int:
    """Says it, in bytes; the exit code is the run's."""
    torch.ones(600, 600).mm(torch.ones(600, 600))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = main(sys.argv[1:])
    sys.stdout.write(f"grown by {1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}\n")
    return code


if __name__ == "__main__":
    sys.exit(grown())
