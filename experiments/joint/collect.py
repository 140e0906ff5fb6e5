"""Collects the study's run folders into results.json beside this file and prints the table.

python experiments/joint/collect.py [--runs outputs/joint]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent


def read_runs(folder: Path) -> list[dict]:
    """What the study keeps of every finished run; `bits` None: the weights were not rounded."""
    runs = []
    for path in sorted(folder.glob("*/results.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        runs.append(
            {
                "pruner": results["pruner"],
                "bits": (results["quantisation"] or {}).get("bits"),
                "target_sparsity": results["target_sparsity"],
                "measured_sparsity": results["measured_sparsity"],
                "seed": results["seed"],
                "perplexity": results["perplexity"]["embedded"],
                "reconstruction_loss": [block["reconstruction_loss"] for block in results["blocks"]],
                "tokens_sha256": results["provenance"]["perplexity"]["embedded"]["tokens_sha256"],
                "calibration_sha256": results["calibration"]["tokens_sha256"],
                "environment": results["environment"],
            }
        )
    return runs


def table(runs: list[dict]) -> list[str]:
    """A row for each method, bits and target, the best first within equal bits, as Markdown."""
    rows: dict[tuple, list[dict]] = {}
    for run in runs:
        rows.setdefault((run["bits"], run["pruner"], run["target_sparsity"]), []).append(run)
    lines = [
        "| bits | method | target | zeros | perplexity | last block's loss | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for (bits, pruner, target), chosen in sorted(rows.items(), key=lambda row: (row[0][0] or 32, mean(row[1]))):
        values = [run["perplexity"] for run in chosen]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        zeros = statistics.mean(run["measured_sparsity"] for run in chosen)
        loss = statistics.mean(run["reconstruction_loss"][-1]["after"] for run in chosen)
        lines.append(
            f"| {bits or 'fp32'} | {pruner} | {target:g} | {zeros:.4f} | {mean(chosen):.3f}{spread} | {loss:.4f} | "
            f"{len(chosen)} |"
        )
    return lines


def mean(runs: list[dict]) -> float:
    """Of the perplexities."""
    return statistics.mean(run["perplexity"] for run in runs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("outputs/joint"))
    found = read_runs(parser.parse_args().runs)
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(table(found)) + "\n")
