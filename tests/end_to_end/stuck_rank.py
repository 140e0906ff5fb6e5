"""Two ranks of a run, of which the second fails while the first waits and hears no signal, as one does in NCCL: a
script for `run_ready`, because it must fork before torch has computed anything.

    stuck_rank.py FOLDER
"""

import signal
import sys
import time
from pathlib import Path


def rank(folder: str) -> None:
    import torch

    from besa_exp.errors import RunError
    from besa_exp.machine import distributed
    from besa_exp.runs.run import opened

    distributed.PATIENCE = 1.0
    with distributed.joined(torch.device("cpu")), opened(Path(folder), False, None):
        if distributed.rank() == 1:
            raise RunError("block 3: the loss is nan")
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        time.sleep(300)


if __name__ == "__main__":
    from two_ranks import launch

    sys.exit(launch(rank, *sys.argv[1:]))
