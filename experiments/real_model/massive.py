"""What the tuning of weights does to the massive token of the real model, under the loss in which all tokens count
alike (`token`) and under the one that is taken (`weighted`). Writes massive.json beside this file:

    python experiments/real_model/massive.py [--loss token weighted] [--seeds 2 1] [--sparsity 0.7] [--blocks 13]

The first blocks are pruned as `best` does it. Of each: the relative squared error of the first token and the mean of
all, of the probe windows, with besa's mask alone and with tuned weights; and the size of the first token as a share of
the dense one, at the end.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import besa_exp
from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.probe import own_probe
from besa_exp.blocks.pruner import PrunedBlock, Task
from besa_exp.methods import tuning
from besa_exp.methods.pruners.besa_reconstruct import BesaReconstruct
from besa_exp.methods.tuning import Tuning
from besa_exp.tensors.losses import token_errors, token_loss, weighted_loss
from besa_exp.tensors.masks import Goal

RESULTS = Path(__file__).with_name("massive.json")
MODEL, TOKENS = "outputs/models/smollm2-135m-instruct", Path("outputs/real_model/tokens")
LOSSES = {"token": token_loss, "weighted": weighted_loss}


@dataclass(frozen=True)
class Watched(BesaReconstruct):
    """Notes in `seen` what becomes of the first token."""

    seen: list[dict[str, Any]] = field(default_factory=list)

    def prune_block(self, task: Task) -> PrunedBlock:
        found = super().prune_block(task)
        inputs, targets = own_probe(task.inputs), own_probe(task.targets)

        def errors_with(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            outputs = task.block.outputs(inputs, len(inputs), weights)
            return token_errors(outputs, targets), outputs[:, 0].norm(dim=-1) / targets[:, 0].norm(dim=-1)

        masked, _ = errors_with({name: weight * found.keep_masks[name] for name, weight in task.weights.items()})
        tuned, shares = errors_with({name: found.weights[name] for name in task.weights} if found.weights else {})
        sizes = targets.norm(dim=-1)
        row = {"block": task.block.index + 1, "times_the_median": float((sizes[:, 0] / sizes.median(dim=-1)[0]).mean())}
        for name, errors in (("mask", masked), ("tuned", tuned)):
            row |= {f"first_{name}": float(errors[:, 0].mean()), f"all_{name}": float(errors.mean())}
        self.seen.append(row | {"share_of_size": [round(float(share), 3) for share in shares]})
        print(self.seen[-1], flush=True)
        return found


def run(seed: int, sparsity: float, num_blocks: int) -> list[dict[str, Any]]:
    model, _ = besa_exp.load_model(MODEL, dtype="float32")
    model.requires_grad_(False)
    samples = load_file(TOKENS / f"calibration-{seed}.safetensors")["input_ids"].long()
    blocks = capture_blocks(model, samples)
    pruner = Watched(Tuning(seed=seed))
    with torch.no_grad():
        inputs = embed(model, blocks, samples, 8)
    list(prune_blocks(blocks[:num_blocks], inputs, pruner, Goal(sparsity), 8))
    return pruner.seen


def main() -> None:
    """Runs what is not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=[*LOSSES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--blocks", type=int, default=13)
    asked = parser.parse_args()
    for seed in asked.seeds:
        for loss in asked.loss:
            name = f"{loss}, {asked.sparsity:g}, seed {seed}"
            if RESULTS.exists() and name in json.loads(RESULTS.read_text()):
                continue
            tuning.weighted_loss = LOSSES[loss]
            seen = run(seed, asked.sparsity, asked.blocks)
            done = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # another process may have written
            RESULTS.write_text(json.dumps(dict(sorted((done | {name: seen}).items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
