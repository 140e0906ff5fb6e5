"""Measures how fast a model decodes with a block less, and with as many parameters less in channels, against itself.

One sequence with a cache, models taking turns; processor time, which other programs on the machine lengthen little. The
channels are random ones: their number alone counts. Prints a Markdown table.

    python experiments/structure/speed.py [--model embedded] [--remove 1 2] [--tokens 24] [--turns 9]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from besa_exp.checkpoints.load import load_model
from besa_exp.checkpoints.narrowed_model import costs_of_model, dimensions_of_model, narrowed_model
from besa_exp.checkpoints.structure import Structure
from besa_exp.display.markdown import markdown_table
from besa_exp.evaluation.cost import counts_of
from besa_exp.methods.structure.widths import chosen_units, random_importances, structure_of
from besa_exp.settings import ModelSettings


@torch.no_grad()
def seconds_a_token(model, tokens: int) -> float:
    """Of decoding after a prompt of 16 tokens."""
    output = model(torch.arange(16)[None] + 3, use_cache=True)
    begun = time.process_time()
    for _ in range(tokens):
        following = output.logits[:, -1:].argmax(dim=-1)
        output = model(following, past_key_values=output.past_key_values, use_cache=True)
    return (time.process_time() - begun) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--remove", type=int, nargs="+", default=[1, 2], help="numbers of blocks")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=9)
    asked = parser.parse_args()
    settings = ModelSettings("model", asked.model, dtype="float32")
    dense = load_model(settings, torch.device("cpu"), offline=True).model
    costs, dimensions = costs_of_model(dense), dimensions_of_model(dense)
    models = {"dense": dense}
    for count in asked.remove:
        removed = [*range(1, 1 + count)]
        left = Structure(tuple(block for block in range(dimensions.blocks) if block not in removed))
        models[f"{count} of {dimensions.blocks} blocks"] = narrowed_model(dense, left)
        gone = sum(costs.blocks[block] for block in removed) / costs.total
        groups, channels = chosen_units(random_importances(dimensions, 0), costs, dimensions, gone, shape="uniform")
        what = "channels" if groups.all() else "heads and channels"
        models[f"{what}, {100 * gone:.1f} %"] = narrowed_model(dense, structure_of(groups, channels))
    taken = {name: [seconds_a_token(model, asked.tokens)] for name, model in models.items()}  # to warm up
    for _ in range(asked.turns):
        for name, model in models.items():
            taken[name].append(seconds_a_token(model, asked.tokens))
    rows = []
    for name, model in models.items():
        quotients = [one / other for one, other in zip(taken["dense"][1:], taken[name][1:], strict=True)]
        cost = counts_of(model, 256)
        counts = [
            f"{cost['parameters']:,}",
            f"{cost['flops_per_token'] / 1e6:.2f}",
            f"{cost['cache_bytes_per_token']:,}",
        ]
        speed = 1 / statistics.median(taken[name][1:])
        rows.append([name, *counts, f"{speed:.0f}", f"{statistics.median(quotients):.2f}"])
    heads = ["gone", "parameters", "MFLOPs a token", "cache bytes a token", "tokens a processor second", "faster"]
    print("\n".join(markdown_table(heads, rows, numbers=True)))


if __name__ == "__main__":
    main()
