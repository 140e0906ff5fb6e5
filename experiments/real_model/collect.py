"""Collects run folders of the study into results.json and tables.md beside this file. What results.json holds already
stays, unless the same run was made again.

    python experiments/real_model/collect.py [outputs/real_model/runs]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from besa_exp.display.markdown import markdown_table
from besa_exp.report.runs import RunRecord, read_run
from besa_exp.report.studies import kept_records, over_seeds

HERE = Path(__file__).parent
METHODS = (
    "dense",
    "magnitude",
    "wanda",
    "ria",
    "wanda+admm",
    "sparsegpt",
    "sparsegpt+reconstruct",
    "besa_paper",
    "besa_linear",
    "besa",
    "besa, scope=model",
    "best",
)
"""In the order of the tables; others follow by name."""
UNSTRUCTURED = "unstructured"
COLUMNS = (("50 %", 0.5, UNSTRUCTURED), ("60 %", 0.6, UNSTRUCTURED), ("70 %", 0.7, UNSTRUCTURED), ("2:4", 0.5, "2:4"))
"""Title, target and pattern."""


def record(run: RunRecord) -> dict[str, Any]:
    """What the study keeps of a run."""
    method = run.method.label.replace(f", {run.pattern}", "")
    by_row = run.pattern == "N:4"  # each row keeps an N of its own: beside 2:4, under a name that says so
    return {
        "method": f"{method}, N:4" if by_row else method,
        "target": run.target,
        "pattern": "2:4" if by_row else run.pattern,
        "seed": run.seed,
        "measured": run.measured,
        "scores": {score.measure.label: score.value for score in run.scores},
        "prune_processor_seconds": run.seconds.get("prune_processor"),
        "peak_host_bytes": run.memory.get("host"),
        "calibration_sha256": run.calibration.get("tokens_sha256"),
        "commit": run.environment.get("git_commit"),
    }


def request(row: dict[str, Any]) -> tuple:
    """What two records of the same run have in common, wherever it was made."""
    return row["method"], row["target"], row["pattern"], row["seed"]


def methods_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Those that were run, in the order of the tables."""
    found = {row["method"] for row in rows}
    return [*(method for method in METHODS if method in found), *sorted(found - {*METHODS})]


def cells(rows: Sequence[dict[str, Any]], method: str, value: str, digits: int = 2) -> list[str]:
    """One method's values over the columns; a dense model has one for all, and no cell is empty without a reason."""
    own = [row for row in rows if row["method"] == method]

    def cell(target: float, pattern: str) -> str:
        fitting = [row for row in own if method == "dense" or (row["target"], row["pattern"]) == (target, pattern)]
        seeds = 1 if method == "dense" else 3
        return over_seeds([row["scores"].get(value) for row in fitting], digits, seeds)

    return [cell(target, pattern) for _, target, pattern in COLUMNS]


def table(rows: Sequence[dict[str, Any]], label: str) -> list[str]:
    """One measure: methods down, targets across; without what was not measured."""
    lines = [[method, *cells(rows, method, label)] for method in methods_of(rows)]
    measured = [line for line in lines if any(cell != "n/a" for cell in line[1:])]
    return [f"## {label}", "", *markdown_table(["method", *(title for title, *_ in COLUMNS)], measured), ""]


def cost_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Processor time of pruning, and zeros that came out, of the first seed."""
    lines = []
    for method in methods_of(rows):
        own = [row for row in rows if row["method"] == method and row["measured"]]
        for row in sorted(own, key=lambda row: (row["pattern"] != UNSTRUCTURED, row["target"], row["seed"])):
            if row["seed"] == 0 and row["prune_processor_seconds"] is not None:
                target = f"{row['target']:.0%}" if row["pattern"] == UNSTRUCTURED else row["pattern"]
                seconds, gigabytes = f"{row['prune_processor_seconds']:.0f}", f"{row['peak_host_bytes'] / 1e9:.1f}"
                lines.append([method, target, f"{row['measured']:.2%}", seconds, gigabytes])
    titles = ["method", "target", "zeros", "processor seconds of pruning", "memory, GB"]
    return ["## Cost", "", *markdown_table(titles, lines), ""]


def main() -> None:
    """Reads the runs, writes the files."""
    folders = [Path(argument) for argument in sys.argv[1:]] or [Path("outputs/real_model/runs")]
    paths = [path.parent for folder in folders for path in sorted(folder.rglob("results.json"))]
    rows = kept_records(HERE / "results.json", (record(read_run(path)) for path in paths), request)
    lines = ["Mean ± sample standard deviation over three seeds, or over as many as stand in brackets.", ""]
    for label in sorted({label for row in rows for label in row["scores"]}):
        lines += table(rows, label)
    lines += cost_table(rows)
    (HERE / "tables.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
