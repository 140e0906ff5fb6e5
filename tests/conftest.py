"""What every test relies on: no network, one thread a worker, and where the shared data may be."""

from __future__ import annotations

import gc
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

# Read by the libraries when they are imported, so set before any test module is.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that wait for each other sleep: the cores are shared
os.environ.pop("HYDRA_FULL_ERROR", None)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each process that a test starts would compile the package again

import pytest

ROOT = Path(__file__).parents[1]
SHARED_DIR = Path(os.environ.get("BESA_SHARED", ROOT.parent / "shared"))
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_configure(config: pytest.Config) -> None:
    """Modules and tests stay for as long as the process: the collector need not walk them; see
    besa_exp/machine/process.py. A process that only deals tests out to workers, which wait for it, imports no torch."""
    gc.disable()
    sys.dont_write_bytecode = False  # each worker would compile the tests again
    if config.getoption("tx", None) and not IN_WORKER and not config.option.collectonly:
        return
    import checked_shapes  # noqa: F401
    import torch
    import yaml

    # Hydra composes some thirty presets for each command, most of a small run's time. The parser in C reads them alike.
    yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # type: ignore[misc]

    if IN_WORKER:
        torch.set_num_threads(1)  # the workers share the cores
        os.environ["OMP_NUM_THREADS"] = "1"  # so do the processes that tests start, whose bytes are compared


@cache
def forks(file: str) -> bool:
    """Whether the tests of a file fork processes from the server of end_to_end/ready_process.py."""
    imports = r"^from (?:ready_process|resumed_runs) import .*(?:_ready|killed)"
    return bool(re.search(imports, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A third of the time goes to files that fork: they begin first, or one worker would end long after the other."""
    items.sort(key=lambda item: not forks(str(item.path)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, but all that forks on one worker: a second server would import torch once more."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "what forks" if forks(file) else file

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # Hypothesis asks the collector who holds what


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of golden files, models and data that are not part of the project; BESA_SHARED names it."""
    if not SHARED_DIR.is_dir():
        pytest.skip(f"{SHARED_DIR} is not there; BESA_SHARED names the folder with golden/, models/ and data/")
    return SHARED_DIR
