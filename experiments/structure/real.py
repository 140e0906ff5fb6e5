"""Takes blocks, or heads and channels, out of the real model of the studies (make real-model), in one process.

Few tokens, for a busy machine: 8 windows of 256 tokens to decide on (SLEB: 2), perplexity on the first 4 windows of
1,024 of WikiText-2's test text. Writes real.json after each and prints a Markdown table of all that are there.

    python experiments/structure/real.py [--model outputs/models/smollm2-135m-instruct]   after tokens.py real_model
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from besa_exp.blocks.block import capture_blocks, embed
from besa_exp.blocks.head import head_of
from besa_exp.checkpoints.load import load_model
from besa_exp.checkpoints.narrowed_model import costs_of_model, dimensions_of_model, narrowed_model
from besa_exp.checkpoints.structure import Structure
from besa_exp.display.markdown import markdown_table
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.methods.budgets.progress import Progress
from besa_exp.methods.structure.method import DenseModel
from besa_exp.methods.structure.shortgpt import ShortGPT
from besa_exp.methods.structure.sleb import Sleb
from besa_exp.methods.structure.widths import Widths
from besa_exp.settings import ModelSettings
from besa_exp.texts.tokens import read_token_file

HERE = Path(__file__).parent
METHODS = {
    "dense": (None, 1),
    "shortgpt, 3 blocks": (ShortGPT(blocks=3), 8),
    "wanda_sp, 3 blocks' parameters": (Widths(0.0789), 8),
    "shortgpt, 6 blocks": (ShortGPT(blocks=6), 8),
    "wanda_sp, 6 blocks' parameters": (Widths(0.1579), 8),
    "random_sp, 3 blocks' parameters": (Widths(0.0789, "random"), 8),
    "sleb, 3 blocks": (Sleb(blocks=3), 2),
    "angular, 3 blocks": (ShortGPT(blocks=3, metric="angular"), 8),
}


def decided(model, method, ids: torch.Tensor) -> Structure:
    """What stays of the model."""
    costs, dimensions = costs_of_model(model), dimensions_of_model(model)
    if method is None:
        return Structure(tuple(range(dimensions.blocks)))
    blocks = capture_blocks(model, ids)
    dense = DenseModel(
        lambda: blocks,
        lambda: embed(model, blocks, ids, 8),
        lambda: head_of(model, blocks, ids),
        ids,
        costs,
        dimensions,
        8,
    )
    with tempfile.TemporaryDirectory() as work:
        return method.choose(dense, Progress(Path(work) / "search.json"), lambda text: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/models/smollm2-135m-instruct")
    parser.add_argument("--tokens", type=Path, default=Path("outputs/real_model/tokens"))
    asked = parser.parse_args()
    model = load_model(ModelSettings("real", asked.model, dtype="float32"), torch.device("cpu"), offline=True).model
    calibration = read_token_file(asked.tokens / "calibration-0.safetensors")[:, :256]
    held_out = read_token_file(asked.tokens / "wikitext2.safetensors")[:4]
    file = HERE / "real.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, (method, windows) in METHODS.items():
        if name in found:
            continue
        begun = time.process_time()
        structure = decided(model, method, calibration[:windows])
        seconds = time.process_time() - begun
        small = narrowed_model(model, structure)
        removed = sorted(set(range(len(model.model.layers))) - {*structure.blocks})
        value = perplexity(small, held_out, held_out.shape[1], 1).value
        left = small.num_parameters() / model.num_parameters()
        found[name] = {"perplexity": value, "left": left, "removed": removed, "processor_seconds": seconds}
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    rows = [
        [name, f"{row['left']:.1%}", ", ".join(map(str, row["removed"])), f"{row['perplexity']:.2f}",
         f"{row['processor_seconds']:.0f}"]
        for name, row in found.items()
    ]  # fmt: skip
    print("\n".join(markdown_table(["gone", "parameters left", "blocks", "perplexity", "seconds to decide"], rows)))


if __name__ == "__main__":
    main()
