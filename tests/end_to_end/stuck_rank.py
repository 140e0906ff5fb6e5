"""Two ranks of a run, of which the second fails while the first waits and hears no signal, as one does in NCCL: a
script for `run_ready`, because it must fork before torch has computed anything.

    stuck_rank.py FOLDER run|evaluate
"""

import signal
import sys
import time
from pathlib import Path


def rank(folder: str, which: str) -> None:
    import torch

    from besa_exp.errors import RunError
    from besa_exp.machine import distributed
    from besa_exp.runs import evaluate, run

    distributed.PATIENCE = 0.2
    path = Path(folder)
    opened = run.opened(path, False, None) if which == "run" else evaluate.opened(path)
    with distributed.joined(torch.device("cpu")), opened:
        if distributed.rank() == 1:
            raise RunError("block 3: the loss is nan")
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        time.sleep(300)


if __name__ == "__main__":
    from two_ranks import launch

    sys.exit(launch(rank, *sys.argv[1:]))
