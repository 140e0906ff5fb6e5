"""Collects the study's run folders into results.json beside this file, and writes a table for each model to tables.md.

A row is a method at one size, over seeds. What is left: parameters of the dense model that are there and not zero.

    python experiments/structure/collect.py [--runs outputs/structure]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from besa_exp.blocks.reports import Removed, StructureReport
from besa_exp.display.markdown import markdown_table
from besa_exp.report.studies import Record, kept_records, over_seeds

HERE = Path(__file__).parent
MODELS = ("smollm2", "embedded", "babyllama", "stories260k")
HEADS = ("method", "left", "blocks gone", "perplexity", "runs")


def read_runs(folder: Path) -> list[Record]:
    """What the study keeps of every finished run."""
    paths = [(model, path) for model in MODELS for path in sorted((folder / model).glob("*/results.json"))]
    return [_record(model, path.parent.name, json.loads(path.read_text(encoding="utf-8"))) for model, path in paths]


def _record(model: str, run: str, results: dict[str, Any]) -> Record:
    ((name, perplexity),) = results["perplexity"].items()
    return {
        "model": model,
        "run": run,
        "method": results["pruner"],
        "seed": results["seed"],
        "structure": results.get("structure"),
        "parameters": results["parameters"],
        "pruned": sum(linear["pruned"] for block in results["blocks"] for linear in block["linears"].values()),
        "perplexity": perplexity,
        "skipping": (results.get("skipping") or {}).get(name),
        "recovery": results.get("recovery"),
        "tokens_sha256": results["provenance"]["perplexity"][name]["tokens_sha256"],
        "environment": results["environment"],
    }


def left(run: Record) -> float:
    """The share of the dense model's parameters that are there and not zero."""
    return (run["parameters"]["left"] - run["pruned"]) / run["parameters"]["dense"]


def gone(run: Record) -> str:
    """The blocks that were removed."""
    if run["structure"] is None:
        return ""
    report = StructureReport.from_dict(run["structure"], run["parameters"])
    return ", ".join(str(change.index) for change in report.changes if isinstance(change, Removed))


def method(run: Record) -> str:
    """`sleb`, `wanda`, `dense, skipping=ffn`, `wanda_sp+full` (tuned), `policy_gradient, uneven`."""
    name = run["method"].removesuffix("+dense").replace("+dense+", "+")
    name += ", uneven" if "-uneven-" in run["run"] else ""
    if under := run["skipping"]:
        name += f", skipping={under['name']}" + f", {under['warm_tokens']} warm" * bool(under["warm_tokens"])
    return name


def table(runs: list[Record]) -> list[str]:
    """A row for each method and size, the largest first, as Markdown."""
    groups: dict[tuple[float, str], list[Record]] = {}
    for run in runs:
        groups.setdefault((round(left(run), 2), method(run)), []).append(run)
    rows = []
    for _, own in sorted(groups.items(), key=lambda item: (-item[0][0], min(run["perplexity"] for run in item[1]))):
        skipped = [f", {run['skipping']['skipped']:.1%} skipped" for run in own if run["skipping"]][:1]
        blocks = "; ".join(dict.fromkeys(filter(None, map(gone, own))))
        found = over_seeds([run["perplexity"] for run in own], 2, len(own))
        rows.append([method(own[0]) + "".join(skipped), f"{left(own[0]):.1%}", blocks, found, str(len(own))])
    return markdown_table(HEADS, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("outputs/structure"))
    found = read_runs(parser.parse_args().runs)
    records = kept_records(HERE / "results.json", found, lambda run: (run["model"], run["run"]))
    lines = ["# Tables", "", "Written by `collect.py` from results.json: a row is a method at one size, over seeds."]
    for model in MODELS:
        if own := [run for run in records if run["model"] == model]:
            lines += ["", f"## {model}", "", *table(own)]
    (HERE / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
