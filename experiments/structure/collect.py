"""Collects the study's run folders into results.json beside this file and prints the table.

python experiments/structure/collect.py [--runs outputs/structure]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from besa_exp.blocks.reports import Narrowed, Removed, StructureReport
from besa_exp.display.markdown import markdown_table
from besa_exp.report.studies import kept_records

HERE = Path(__file__).parent


def read_runs(folder: Path) -> list[dict]:
    """What the study keeps of every finished run."""
    return [
        {
            "run": path.parent.name,
            "structure": results.get("structure"),
            "parameters": results["parameters"],
            "measured_sparsity": results["measured_sparsity"],
            "perplexity": results["perplexity"]["embedded"],
            "structure_seconds": results["seconds"].get("structure"),
            "tokens_sha256": results["provenance"]["perplexity"]["embedded"]["tokens_sha256"],
            "calibration_sha256": (results["calibration"] or {}).get("tokens_sha256"),
            "environment": results["environment"],
        }
        for path in sorted(folder.glob("*/results.json"))
        for results in [json.loads(path.read_text(encoding="utf-8"))]
    ]


def gone(run: dict) -> str:
    """What was taken out, in words."""
    if run["structure"] is None:
        return "nothing"
    report = StructureReport.from_dict(run["structure"], run["parameters"])
    removed = [str(change.index) for change in report.changes if isinstance(change, Removed)]
    if removed:
        return f"blocks {', '.join(removed)}"
    (sizes,) = {(one.groups, one.channels) for one in report.changes if isinstance(one, Narrowed)}
    return ", ".join(
        f"{size.dense - size.left} of {size.dense} {what}"
        for what, size in zip(("groups", "channels"), sizes, strict=True)
    )


def table(runs: list[dict]) -> list[str]:
    """A row for each run, by parameters left, as Markdown."""
    ordered = sorted(runs, key=lambda run: (-run["parameters"]["left"] // 100_000, run["perplexity"]))
    rows = [
        [
            run["run"],
            gone(run),
            f"{run['parameters']['left'] / run['parameters']['dense']:.1%}",
            f"{run['measured_sparsity']:.0%}",
            f"{run['perplexity']:.2f}",
        ]
        for run in ordered
    ]
    return markdown_table(["structure, ratio, pruner", "gone", "parameters left", "zeros in them", "perplexity"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("outputs/structure"))
    found = read_runs(parser.parse_args().runs)
    sys.stdout.write("\n".join(table(kept_records(HERE / "results.json", found, lambda run: run["run"]))) + "\n")
