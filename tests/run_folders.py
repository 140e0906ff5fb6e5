"""Run folders as a run leaves them, without running one: what the tests of `besa report` read."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

LINEARS = {"self_attn.q_proj": 64, "self_attn.k_proj": 32, "mlp.down_proj": 96}
RESULTS: dict[str, Any] = {
    "model": "models/tiny",
    "pruner": "wanda",
    "pattern": "unstructured",
    "seed": 0,
    "target_sparsity": 0.5,
    "measured_sparsity": 0.5,
    "linears": 6,
    "perplexity": {"wikitext2": 20.0},
    "zero_shot": {
        "piqa": {"acc,none": 0.6, "acc_stderr,none": 0.1, "acc_norm,none": 0.7},
        "boolq": {"acc,none": 0.4, "acc_stderr,none": 0.1},
    },
    "unavailable": {},
    "seconds": {"prune": 2.0, "total": 5.0},
    "peak_memory_bytes": {"host": 2**28, "device": 0},
    "calibration": {
        "name": "c4",
        "num_samples": 128,
        "seq_len": 2048,
        "tokens_sha256": "c0",
        "provenance": {"set": "c4", "text_sha256": "ab" * 32},
    },
    "environment": {"python": "3.11", "git_commit": "0" * 40},
    "provenance": {
        "perplexity": {"wikitext2": {"tokens_sha256": "e0" * 32, "seq_len": 2048}},
        "zero_shot": {
            "max_length": 2048,
            "tasks": {
                task: {"version": 1.0, "num_fewshot": 0, "documents": 100, "data": f"hub: {task}"}
                for task in ("piqa", "boolq")
            },
        },
    },
}
STATUS = {"status": "done", "started": "2026-01-01T00:00:00+00:00", "process": 1, "host": "elsewhere", "error": None}
CONFIG = {"model": {"path": "models/tiny", "revision": None, "dtype": "float32"}, "pruner": {}}


def block(index: int, sparsity: float = 0.5, loss: float = 0.01) -> dict[str, Any]:
    """One block of results.json."""
    linears = {
        name: {"weights": weights, "pruned": int(weights * sparsity), "sparsity": sparsity}
        for name, weights in LINEARS.items()
    }
    return {
        "index": index,
        "reconstruction_loss": {"before": 2 * loss, "after": loss},
        "seconds": 1.0,
        "linears": linears,
    }


def finished_run(
    folder: Path,
    changes: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    status: Mapping[str, Any] | None = None,
    steps: int = 0,
) -> Path:
    """A finished run; `changes` are dotted keys of results.json (`/` stands for a dot inside one), and new values."""
    results = copy.deepcopy(RESULTS) | {"blocks": [block(0), block(1, loss=0.02)]}
    for path, value in (changes or {}).items():
        *parents, last = (part.replace("/", ".") for part in path.split("."))
        node: Any = results
        for parent in parents:
            node = node[parent]
        node[last] = value
    folder.mkdir(parents=True)
    finished = {"finished": "2026-01-01T00:01:00+00:00", "command": "besa prune pruner=wanda"}
    (folder / "status.json").write_text(json.dumps(STATUS | finished | dict(status or {})))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | dict(config or {})))
    lines = [
        {"kind": "step", "block": 0, "step": step, "loss": 1.0, "reconstruction": 1 / (step + 1), "penalty": 0.0}
        | {"expected_sparsity": 0.5}
        for step in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def unfinished_run(folder: Path, **status: Any) -> Path:
    """A run with a status alone."""
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps(STATUS | {"finished": None} | status))
    return folder
