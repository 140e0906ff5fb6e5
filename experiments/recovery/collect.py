"""Collects the study's run folders into results.json and tables.md beside this file, or what `study.py` has recorded
into study_<model>.json and study.md.

python experiments/recovery/collect.py FOLDER, which holds dense, PRUNER_SPARSITY and PRUNER_SPARSITY_RECOVERY
python experiments/recovery/collect.py [outputs/recovery]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from besa_exp.display.markdown import markdown_table

HERE = Path(__file__).parent
METHODS = ("full", "lora", "scale", "norms", "blocks", "spiel", "sketch", "mezo")
"""In the order of the tables."""
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
    """Writes both files; nothing where there is no run, so that what is recorded stays."""
    runs = [record(path) for path in sorted(folder.glob("*/results.json"))]
    if not runs:
        sys.exit(f"{folder}: no finished run, and no record of study.py; what is recorded stays as it is")
    runs.sort(key=lambda run: (round(run["measured_sparsity"], 2), run["recovery"] is not None, run["method"]))
    (HERE / "results.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    table = markdown_table(HEADS, [cells(run) for run in runs], numbers=True)
    (HERE / "tables.md").write_text("\n".join(table) + "\n", encoding="utf-8")


def study(records: Sequence[Path]) -> None:
    """Keeps the records, and writes a table a model."""
    lines: list[str] = []
    for path in records:
        content = path.read_text(encoding="utf-8")
        (HERE / f"study_{path.stem}.json").write_text(content, encoding="utf-8")
        lines += [f"## {path.stem}", "", *study_table(json.loads(content)), ""]
    (HERE / "study.md").write_text("\n".join(lines), encoding="utf-8")


def study_table(records: Mapping[str, dict[str, Any]]) -> list[str]:
    """A row a start, a column a method."""
    runs = [run for run in records.values() if run["start"] != "dense"]
    own = {(run["start"], run["method"]): run for run in runs}
    methods = sorted({run["method"] for run in runs if run["method"]}, key=METHODS.index)
    rows = [
        [start, f"{own[start, None]['perplexity']:.2f}", *(_tuned(own.get((start, method))) for method in methods)]
        for start in dict.fromkeys(run["start"] for run in runs)
    ]
    return markdown_table(["start", "not tuned", *methods], rows, numbers=True)


def _tuned(run: Mapping[str, Any] | None) -> str:
    """Perplexity, and the step size that was found."""
    return f"{run['perplexity']:.2f} ({run['lr']:.1g})" if run else "not run"


if __name__ == "__main__":
    given = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/recovery")
    recorded = sorted(given.glob("*.json"))
    if recorded:
        study(recorded)
    else:
        main(given)
