"""Collects the study's run folders into results.json and tables.md beside this file.

python experiments/recovery/collect.py FOLDER, which holds dense, PRUNER_SPARSITY and PRUNER_SPARSITY_RECOVERY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from besa_exp.display.markdown import markdown_table

HERE = Path(__file__).parent
HEADS = ("sparsity", "method", "perplexity", "held-out loss before", "after", "tokens", "processor seconds")


def record(path: Path) -> dict:
    """What the study keeps of a finished run."""
    results = json.loads(path.read_text(encoding="utf-8"))
    seconds = results["seconds"]
    return {
        "name": path.parent.name,
        "method": results["pruner"],
        "seed": results["seed"],
        "measured_sparsity": results["measured_sparsity"],
        "perplexity": results["perplexity"],
        "recovery": results.get("recovery"),
        "processor_seconds": seconds.get("recover_processor", seconds.get("prune_processor")),
        "environment": results["environment"],
    }


def cells(run: dict) -> list[str]:
    """A row of the table."""
    recovery, (perplexity,) = run["recovery"], run["perplexity"].values()
    loss = recovery["loss"] if recovery else {}
    seconds = run["processor_seconds"]
    return [
        f"{run['measured_sparsity']:.1%}",
        run["method"],
        f"{perplexity:.3f}",
        *(f"{loss[name]:.4f}" if loss else "" for name in ("before", "after")),
        f"{recovery['tokens']:,}" if recovery else "",
        f"{seconds:.0f}" if seconds else "",
    ]


def main(folder: Path) -> None:
    """Writes both files."""
    runs = [record(path) for path in sorted(folder.glob("*/results.json"))]
    runs.sort(key=lambda run: (round(run["measured_sparsity"], 2), run["recovery"] is not None, run["method"]))
    (HERE / "results.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    table = markdown_table(HEADS, [cells(run) for run in runs], numbers=True)
    (HERE / "tables.md").write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
