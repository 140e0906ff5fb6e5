"""Collects the study's run folders into results.json, tables.md and perplexity.png beside this file.

What results.json holds already stays, unless the same method, target and seed were run again.

python experiments/first_results/collect.py [--runs outputs/first_results]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from besa_exp.display.markdown import markdown_table
from besa_exp.report.studies import kept_records, over_seeds

HERE = Path(__file__).parent
MODELS = ("embedded", "babyllama-105", "stories260K")
METHODS = ("magnitude", "wanda", "sparsegpt", "besa_paper", "besa_linear", "besa")
SEEDS = 3
TASK = ("embedded_continuations", "acc,none")


def read_runs(folder: Path) -> list[dict]:
    """What the study keeps of every finished run; `folder` holds one of each model."""
    runs = []
    for path in sorted(folder.glob("*/*/results.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        ((name, perplexity),) = results["perplexity"].items()
        runs.append(
            {
                "model": path.parts[-3],
                "pruner": results["pruner"],
                "target_sparsity": results["target_sparsity"],
                "measured_sparsity": results["measured_sparsity"],
                "seed": results["seed"],
                "perplexity": perplexity,
                "accuracy": results["zero_shot"].get(TASK[0], {}).get(TASK[1]),
                "prune_seconds": results["seconds"].get("prune"),
                "tokens_sha256": results["provenance"]["perplexity"][name]["tokens_sha256"],
                "calibration_sha256": (results["calibration"] or {}).get("tokens_sha256"),
                "environment": results["environment"],
            }
        )
    return runs


def request(run: dict) -> tuple:
    """What two records of the same run have in common, wherever it was made."""
    return run["model"], run["pruner"], run["target_sparsity"], run["seed"]


def cell(runs: list[dict], pruner: str, sparsity: float, key: str, digits: int) -> str:
    """Mean and, over several seeds, the sample standard deviation."""
    chosen = [run for run in runs if run["pruner"] == pruner and run["target_sparsity"] == sparsity]
    return over_seeds([run[key] for run in chosen], digits, seeds=1 if pruner == "magnitude" else SEEDS)


def table(runs: list[dict], key: str, digits: int) -> list[str]:
    """Methods by target sparsity, as Markdown."""
    targets = sorted({run["target_sparsity"] for run in runs if run["pruner"] in METHODS})
    rows = [[method, *(cell(runs, method, target, key, digits) for target in targets)] for method in METHODS]
    return markdown_table(["method", *(f"{target:.0%}" for target in targets)], rows)


def tables(by_model: dict[str, list[dict]]) -> str:
    """All tables."""
    lines = ["Mean ± sample standard deviation over three seeds, or over as many as are told in brackets.", ""]
    for model, runs in by_model.items():
        if not runs:
            lines += [f"## {model}", "", "n/a: no runs (its weights and text are not part of this repository)", ""]
            continue
        dense = next((run for run in runs if run["pruner"] == "dense"), None)
        lines += [f"## {model}", ""]
        if dense:
            accuracy = f", zero-shot accuracy {dense['accuracy']:.4f}" if dense["accuracy"] is not None else ""
            lines += [f"Dense: perplexity {dense['perplexity']:.3f}{accuracy}.", ""]
        lines += ["Held-out perplexity:", "", *table(runs, "perplexity", 3), ""]
        if any(run["accuracy"] is not None for run in runs):
            lines += ["Zero-shot accuracy (four choices, chance 0.25):", "", *table(runs, "accuracy", 4), ""]
        lines += ["Measured sparsity:", "", *table(runs, "measured_sparsity", 4), ""]
        lines += ["Seconds of the block loop:", "", *table(runs, "prune_seconds", 1), ""]
    return "\n".join(lines)


def plot(by_model: dict[str, list[dict]], path: Path) -> None:
    """Perplexity over dense against target sparsity, one panel a model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    drawn = {model: runs for model, runs in by_model.items() if runs}
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(5 * len(drawn), 4), squeeze=False)
    for axis, (model, runs) in zip(axes[0], drawn.items(), strict=True):
        dense = next(run["perplexity"] for run in runs if run["pruner"] == "dense")
        targets = sorted({run["target_sparsity"] for run in runs if run["pruner"] in METHODS})
        for method in METHODS:
            values = [
                [
                    run["perplexity"] / dense
                    for run in runs
                    if (run["pruner"], run["target_sparsity"]) == (method, target)
                ]
                for target in targets
            ]
            if all(values):
                means = [statistics.mean(value) for value in values]
                errors = [statistics.stdev(value) if len(value) > 1 else 0 for value in values]
                axis.errorbar(targets, means, errors, marker="o", label=method, color=f"C{METHODS.index(method)}")
        axis.set(title=model, xlabel="target sparsity", ylabel="perplexity / dense", yscale="log")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Reads the runs, writes the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("outputs/first_results"))
    runs = kept_records(HERE / "results.json", read_runs(parser.parse_args().runs), request)
    by_model = {model: [run for run in runs if run["model"] == model] for model in MODELS}
    (HERE / "tables.md").write_text(tables(by_model), encoding="utf-8")
    plot(by_model, HERE / "perplexity.png")
    print((HERE / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
