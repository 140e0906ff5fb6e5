"""Gives one block of SmolLM2-135M all its heads back, where Wanda-sp's equal widths took a group from every block.

    python experiments/structure/one_group.py [--blocks 1 5]

after `run.py smollm2`, whose structures it reads. Prints the perplexity of each structure as it is, and with each
block whole.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from besa_exp.checkpoints.load import load_model
from besa_exp.checkpoints.narrowed_model import narrowed_model
from besa_exp.checkpoints.structure import Structure
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.settings import ModelSettings
from besa_exp.texts.tokens import read_token_file

RUNS, TEXT = Path("outputs/structure/smollm2"), Path("outputs/real_model/tokens/wikitext2.safetensors")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 5])
    settings = ModelSettings("smollm2", "outputs/models/smollm2-135m-instruct", dtype="float32")
    model, ids = load_model(settings, torch.device("cpu"), offline=True).model, read_token_file(TEXT)
    blocks = parser.parse_args().blocks
    for run in sorted(RUNS.glob("wanda_sp-*-dense-0")):
        found = json.loads((run / "structure.json").read_text(encoding="utf-8"))
        kept = [tuple(tuple(found[kind][str(block)]) for block in found["blocks"]) for kind in ("groups", "channels")]
        structure = Structure(tuple(found["blocks"]), *kept)
        every = tuple(range(max(map(max, kept[0])) + 1))
        for whole in [None, *blocks]:
            groups = tuple(every if block == whole else own for block, own in enumerate(kept[0]))
            small = narrowed_model(model, replace(structure, groups=groups), uneven=True)
            said = "as it is" if whole is None else f"block {whole} with all heads"
            print(f"{run.name}, {said}: {perplexity(small, ids, ids.shape[1], 4).value:.1f}", flush=True)
