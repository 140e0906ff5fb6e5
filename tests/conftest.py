"""What every test relies on: no network, one thread a worker, and where the shared data may be."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Read by the libraries when they are imported, so set before any test module is.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
os.environ.pop("HYDRA_FULL_ERROR", None)

import pytest
import torch
from jaxtyping import install_import_hook

# Shapes are types: every annotated function of these modules is checked at each call, in tests only.
SHAPED = "blocks calibration checkpoint evaluation importance kernels linears masks pruners pruning"
SHAPED += " observation permutation replay_check statistics tokens"
install_import_hook([f"besa_exp.{module}" for module in SHAPED.split()], "beartype.beartype")

ROOT = Path(__file__).parents[1]
SHARED_DIR = Path(os.environ.get("BESA_SHARED", ROOT.parent / "shared"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_configure() -> None:
    """Modules and tests stay for as long as the process: the collector need not walk them; see besa_exp/process.py."""
    gc.disable()


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
