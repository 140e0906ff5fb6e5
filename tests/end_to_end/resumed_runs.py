"""A run that is killed at given moments, and what must be the same as in one that never was."""

from __future__ import annotations

import json
from pathlib import Path

from ready_process import run_ready

BLOCKS = 5  # of the model that is pruned


def killed(arguments: list[str], folder: Path, moments: list[dict]) -> list[dict]:
    """Starts the run in `folder` again and again and kills it at the moments; see killed_runs.py."""
    done = run_ready("killed_runs.py", str(folder), json.dumps(moments), *arguments)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout.splitlines()[-1])


def results_of(folder: Path) -> dict:
    """results.json without what differs from one time to the next."""
    results = json.loads((folder / "results.json").read_text())
    for key in ("seconds", "peak_memory_bytes", "environment", "command", "started", "finished"):
        results.pop(key, None)  # a tuning tells no command
    for block in results["blocks"]:
        block.pop("seconds")
    return results


def metrics_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "time")} for line in lines]


def assert_equal_runs(folder: Path, unbroken: Path) -> None:
    """The same bytes and numbers, and nothing left of the way there."""
    for name in ("model/model.safetensors", "model/config.json", "masks.safetensors", "sparsity.csv"):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name
    assert metrics_of(folder) == metrics_of(unbroken)
    assert results_of(folder) == results_of(unbroken)
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    assert not (folder / "blocks").exists()
    assert not list(folder.rglob(".*.partial"))
