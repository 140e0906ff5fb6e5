"""Collects the study's run folders into results.json beside this file and prints the table.

What results.json holds already stays, unless the same run was made again.

python experiments/joint/collect.py [--runs outputs/joint]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from besa_exp.display.markdown import markdown_table
from besa_exp.report.studies import kept_records, over_seeds

HERE = Path(__file__).parent


def read_runs(folder: Path) -> list[dict]:
    """What the study keeps of every finished run; `bits` None: the weights were not rounded. A dense run is not
    calibrated, and its blocks have no loss."""
    runs = []
    for path in sorted(folder.glob("*/results.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        ((name, perplexity),) = results["perplexity"].items()
        runs.append(
            {
                "pruner": results["pruner"],
                "bits": (results["quantisation"] or {}).get("bits"),
                "target_sparsity": results["target_sparsity"],
                "measured_sparsity": results["measured_sparsity"],
                "seed": results["seed"],
                "perplexity": perplexity,
                "reconstruction_loss": [
                    loss for block in results["blocks"] if (loss := block.get("reconstruction_loss"))
                ],
                "tokens_sha256": results["provenance"]["perplexity"][name]["tokens_sha256"],
                "calibration_sha256": (results["calibration"] or {}).get("tokens_sha256"),
                "environment": results["environment"],
            }
        )
    return runs


def request(run: dict) -> tuple:
    """What two records of the same run have in common, wherever it was made."""
    target = 0.0 if run["pruner"] == "dense" else run["target_sparsity"]  # 0.5 is what it was once recorded with
    return run["pruner"], run["bits"], target, run["seed"]


def table(runs: list[dict]) -> list[str]:
    """A row for each method, bits and target, the best first within equal bits, as Markdown."""
    rows: dict[tuple, list[dict]] = {}
    for run in runs:
        rows.setdefault((run["bits"], run["pruner"], run["target_sparsity"]), []).append(run)
    lines = []
    for (bits, pruner, target), chosen in sorted(rows.items(), key=lambda row: (row[0][0] or 32, mean(row[1]))):
        perplexity = over_seeds([run["perplexity"] for run in chosen], 3)
        zeros = statistics.mean(run["measured_sparsity"] for run in chosen)
        losses = [run["reconstruction_loss"][-1]["after"] for run in chosen if run["reconstruction_loss"]]
        loss = f"{statistics.mean(losses):.4f}" if losses else "n/a"
        lines.append([str(bits or "fp32"), pruner, f"{target:g}", f"{zeros:.4f}", perplexity, loss])
    return markdown_table(["bits", "method", "target", "zeros", "perplexity", "last block's loss"], lines)


def mean(runs: list[dict]) -> float:
    """Of the perplexities."""
    return statistics.mean(run["perplexity"] for run in runs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("outputs/joint"))
    runs = kept_records(HERE / "results.json", read_runs(parser.parse_args().runs), request)
    sys.stdout.write("\n".join(table(runs)) + "\n")
