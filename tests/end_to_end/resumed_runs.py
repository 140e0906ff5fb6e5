"""A run that is killed at given moments, and what must be the same as in one that never was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

BLOCKS = 5  # of the model that is pruned


def killed(arguments: list[str], folder: Path, moments: list[dict]) -> list[dict]:
    """Starts the run in `folder` again and again and kills it at the moments; see killed_runs.py."""
    script = [sys.executable, str(Path(__file__).parent / "killed_runs.py"), str(folder), json.dumps(moments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment.pop("WANDB_SERVICE", None)  # this process's own: it would outlive the killed ones and hold their runs
    done = subprocess.run([*script, *arguments], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def results_of(folder: Path) -> dict:
    """results.json without what differs from one time to the next."""
    results = json.loads((folder / "results.json").read_text())
    for key in ("seconds", "peak_memory_bytes", "environment"):
        results.pop(key)
    for block in results["blocks"]:
        block.pop("seconds")
    return results


def metrics_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_equal_runs(folder: Path, unbroken: Path) -> None:
    """The same bytes and numbers, and nothing left of the way there."""
    for name in ("model/model.safetensors", "model/config.json", "masks.safetensors", "sparsity.csv"):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name
    assert metrics_of(folder) == metrics_of(unbroken)
    assert results_of(folder) == results_of(unbroken)
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    assert not (folder / "blocks").exists()
    assert not list(folder.rglob(".*.partial"))
