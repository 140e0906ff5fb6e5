"""`torchrun --nproc-per-node 2 -m besa_exp ...` by torch's own launcher, with forked ranks: a script for `run_ready`,
because it must fork before torch has computed anything.

    two_ranks.py besa-arguments...
"""

import sys
from collections.abc import Callable
from tempfile import TemporaryDirectory

from besa_exp.machine.process import only_the_leader_speaks


def rank(*arguments: str) -> None:
    from besa_exp.cli.main import main

    only_the_leader_speaks()
    if code := main([*arguments]):
        sys.exit(code)


def launch(entry: Callable[..., None], *arguments: str) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with TemporaryDirectory() as logs:  # torch's own would stay
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=2,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            run_id="two ranks",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="fork",
        )
        elastic_launch(config, entry)(*arguments)
    return 0


if __name__ == "__main__":
    sys.exit(launch(rank, *sys.argv[1:]))
