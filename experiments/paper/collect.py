"""Collects the study's run folders into results.json, tables.md and the figures beside this file.

Beside what results.json of a run says, it measures the error of the hidden states against the dense model's after each
block, on held-out tokens: ||H - H_dense||^2 / ||H_dense||^2. A run's own reconstruction loss is relative to the dense
block on the pruned prefix, so that it does not show what accumulates.

What results.json here holds already stays, unless the same run was made again.

    python experiments/paper/collect.py [--shared ../shared] [--runs outputs/paper/runs]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import figures
import tables
import torch
from transformers import AutoModelForCausalLM

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.sparsity_table import linear_type, short_names
from besa_exp.report.runs import RunRecord, read_run
from besa_exp.report.studies import kept_records
from besa_exp.texts.embedded.text import MODEL_DIR
from besa_exp.texts.tokens import read_token_file

HERE = Path(__file__).parent
WINDOWS = 16  # held-out ones that the hidden states are compared on


def hidden_states(folder: Path, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What leaves each block of the model in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = capture_blocks(model, tokens)
    states = [embed(model, blocks, tokens, len(tokens))]
    for block in blocks:
        states.append(block.outputs(states[-1], len(tokens)))
    return states[1:]


def errors(folder: Path, dense: list[torch.Tensor], tokens: torch.Tensor) -> list[float]:
    """Relative squared error after each block."""
    pairs = zip(hidden_states(folder, tokens), dense, strict=True)
    return [float((own - theirs).double().square().sum() / theirs.double().square().sum()) for own, theirs in pairs]


def short(run: RunRecord) -> dict[str, str]:
    """{kind of linear: its short name}; empty of a dense run, whose blocks are not reported."""
    return short_names([linear_type(linear.name) for block in run.blocks[:1] for linear in block.linears])


def calibration(run: RunRecord) -> list[str | int]:
    """Source and windows. A dense run has neither: it stands beside the usual ones."""
    if not run.calibration:
        return tables.source_and_windows(run.model)
    return [Path(run.calibration["name"]).stem.split("-")[0], run.calibration["num_samples"]]


def sparsities(run: RunRecord) -> list[dict[str, float]]:
    """Of each linear, by block."""
    names = short(run)
    return [{names[linear.name]: linear.pruned / linear.weights for linear in block.linears} for block in run.blocks]


def record(run: RunRecord) -> dict:
    """What the study keeps of a run; `error` is added where its model is there."""
    (perplexity,) = [score.value for score in run.scores if score.measure.kind == "perplexity"]
    speed = run.simulated_speed.get("linears", {})
    names = short(run)
    accuracies = [score.value for score in run.scores if score.measure.metric == "acc_norm"]
    return {
        "model": run.model,
        "method": run.method.label,
        "target": run.target,
        "calibration": calibration(run),
        "seed": run.seed,
        "measured": run.measured,
        "perplexity": perplexity,
        **({"accuracy": accuracies[0]} if accuracies else {}),
        "loss": [[block.loss_before, block.loss_after] for block in run.blocks],
        "sparsity": sparsities(run),
        "simulated_speed_up": {names.get(kind, kind): row["speed_up"] for kind, row in speed.items()},
        "calibration_sha256": run.calibration.get("tokens_sha256"),
        "commit": run.environment.get("git_commit"),
    }


def rounded(value: Any) -> Any:
    """Six significant digits are enough."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def request(row: dict) -> tuple:
    """What two records of the same run have in common, wherever it was made."""
    return row["model"], row["method"], *row["calibration"], row["target"], row["seed"]


def found(runs: Path, shared: Path, tokens: Path) -> list[dict]:
    """The records of all finished runs."""
    records = []
    dense: dict[str, tuple[list[torch.Tensor], torch.Tensor]] = {}
    for path in sorted(folder.parent for folder in runs.glob("*/results.json")):
        run = read_run(path)
        row = record(run)
        if run.model not in dense:
            folder = MODEL_DIR if run.model == "embedded" else shared / "models" / run.model
            held_out = read_token_file(tokens / run.model / "held-out.safetensors")[:WINDOWS]
            dense[run.model] = hidden_states(folder, held_out), held_out
        if row["method"] == "dense":
            row["error"] = [0.0] * len(dense[run.model][0])
        elif (path / "model").is_dir():
            row["error"] = errors(path / "model", *dense[run.model])
        records.append(row)
    return records


def main() -> None:
    """Reads the runs, writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("BESA_SHARED", "../shared")))
    parser.add_argument("--runs", type=Path, default=Path("outputs/paper/runs"))
    parser.add_argument("--tokens", type=Path, default=Path("outputs/paper/tokens"))
    given = parser.parse_args()
    new = rounded(found(given.runs, given.shared, given.tokens))
    rows = kept_records(HERE / "results.json", new, request)
    (HERE / "tables.md").write_text(tables.tables(rows), encoding="utf-8")
    figures.draw(rows, HERE)
    print((HERE / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
