"""Collects run folders of the study into results.json and tables.md beside this file. What results.json holds already
stays, unless the same run was made again.

    python experiments/real_model/collect.py [outputs/real_model/runs]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from besa_exp.display.markdown import markdown_table
from besa_exp.report.runs import RunRecord, read_run
from besa_exp.report.studies import kept_records, over_seeds

HERE = Path(__file__).parent
METHODS = ("dense", "wanda", "sparsegpt", "besa_paper", "besa, loss=channel", "besa", "besa, scope=model", "best")
TARGETS = (0.5, 0.6, 0.7)


def record(run: RunRecord) -> dict[str, Any]:
    """What the study keeps of a run."""
    return {
        "method": run.method.label,
        "target": run.target,
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
    return row["method"], row["target"], row["seed"]


def table(rows: list[dict[str, Any]], label: str) -> list[str]:
    """One measure: methods down, targets across."""

    def cell(method: str, target: float) -> str:
        found = [row["scores"].get(label) for row in rows if (row["method"], row["target"]) == (method, target)]
        return over_seeds(found, 2)

    lines = [[method, *(cell(method, target) for target in TARGETS)] for method in METHODS]
    return [f"## {label}", "", *markdown_table(["method", *(f"{target:.0%}" for target in TARGETS)], lines), ""]


def main() -> None:
    """Reads the runs, writes the files."""
    folders = [Path(argument) for argument in sys.argv[1:]] or [Path("outputs/real_model/runs")]
    paths = [path.parent for folder in folders for path in sorted(folder.rglob("results.json"))]
    rows = kept_records(HERE / "results.json", (record(read_run(path)) for path in paths), request)
    lines = ["Mean ± sample standard deviation over three seeds, or over as many as are told in brackets.", ""]
    for label in sorted({label for row in rows for label in row["scores"]}):
        lines += table(rows, label)
    (HERE / "tables.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
