"""What is lost block by block in pruned real models, and what each kind of linear gave up. Writes depth.json beside
this file, and keeps there what is not given again:

    python experiments/real_model/depth.py RUN ...     # run folders with a saved model

The error is that of the hidden states against the dense model's after each block, each token relative to its own size
(`besa_exp/tensors/losses.py: token_errors`), mean over the first windows of the held-out text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.sparsity_table import linear_type, short_names
from besa_exp.report.runs import RunRecord, read_run
from besa_exp.tensors.losses import token_errors

RESULTS = Path(__file__).with_name("depth.json")
MODEL, HELD_OUT = Path("outputs/models/smollm2-135m-instruct"), Path("outputs/real_model/tokens/wikitext2.safetensors")
WINDOWS = 4


@torch.no_grad()
def hidden_states(folder: Path, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What leaves each block of the model in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = capture_blocks(model, tokens)
    states = [embed(model, blocks, tokens, 1)]
    for block in blocks:
        states.append(block.outputs(states[-1], 1))
    return states[1:]


def sparsities(run: RunRecord) -> dict[str, float]:
    """Of each kind of linear, over all blocks."""
    linears = [linear for block in run.blocks for linear in block.linears]
    names = short_names(dict.fromkeys(linear_type(linear.name) for linear in linears))
    pruned, weights = dict.fromkeys(names.values(), 0), dict.fromkeys(names.values(), 0)
    for linear in linears:
        name = names[linear_type(linear.name)]
        pruned[name] += linear.pruned
        weights[name] += linear.weights
    return {name: round(pruned[name] / weights[name], 4) for name in pruned}


def main(folders: list[Path]) -> None:
    """Measures the runs' models, writes the file."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    tokens = load_file(HELD_OUT)["input_ids"][:WINDOWS]
    dense = hidden_states(MODEL, tokens)
    for folder in folders:
        run, states = read_run(folder), hidden_states(folder / "model", tokens)
        errors = [float(token_errors(own, target).mean()) for own, target in zip(states, dense, strict=True)]
        calibration = f"{run.calibration['num_samples']} x {run.calibration['seq_len']} tokens"
        name = f"{run.method.label}, {run.target:.0%}, {calibration}, seed {run.seed}"
        rows[name] = {"error": [float(f"{error:.4g}") for error in errors], "sparsity": sparsities(run)}
        print(name, rows[name], flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main([Path(given) for given in sys.argv[1:]])
