"""What the methods cost on one block of a real model: processor time and memory, beside two dense passes of the block.

Block 15 of SmolLM2-135M (make real-model) on the real inputs that the dense blocks before it give, in fp32. `best` is
what it does in a block; its tuning of the whole model is not part of it. Each method runs in a process of its own:
memory is what its peak adds to that of loading the model and two passes, in units of the block's weights. Processor
time, so that other work on the machine does not lengthen it much.

    python experiments/benchmarks/real_block.py [--samples 32]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from machine import describe_machine
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from besa_exp.blocks.block import Block, capture_blocks, embed
from besa_exp.blocks.loop import prune_blocks
from besa_exp.blocks.pruner import Pruner
from besa_exp.display.markdown import markdown_table
from besa_exp.methods.pruners.besa import Besa
from besa_exp.methods.pruners.besa_reconstruct import BesaReconstruct
from besa_exp.methods.pruners.sparsegpt import SparseGPT
from besa_exp.methods.pruners.uniform import Uniform
from besa_exp.tensors.masks import Goal
from besa_exp.texts.embedded.text import calibration_documents

HERE = Path(__file__).parent
MODEL = Path("outputs/models/smollm2-135m-instruct")
METHODS: dict[str, type[Pruner] | None] = {
    "two passes": None,
    "wanda": Uniform,
    "sparsegpt": SparseGPT,
    "besa": Besa,
    "best": BesaReconstruct,
}
BATCH = 4


def block_and_inputs(number: int, samples: int, length: int) -> tuple[Block, Tensor]:
    """The block, and what the dense blocks before it make of windows of the package's own text."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).requires_grad_(False)
    text = "\n\n".join(calibration_documents().documents[:600])
    ids = AutoTokenizer.from_pretrained(MODEL)(text, add_special_tokens=False, verbose=False).input_ids
    tokens = torch.tensor(ids[: samples * length]).view(samples, length)
    blocks = capture_blocks(model, tokens)
    states = embed(model, blocks, tokens, BATCH)
    for block in blocks[:number]:
        block.outputs(states, BATCH, out=states)
    return blocks[number], states


def measured(method: str, block: Block, inputs: Tensor) -> dict[str, float]:
    """In this process: processor seconds of the method on the block, and what its peak adds to that of two passes."""
    for _ in range(2):
        outputs = block.outputs(inputs, BATCH)
    del outputs
    before, began = peak(), time.process_time()
    pruner = METHODS[method]
    if pruner is None:
        for _ in range(2):
            block.outputs(inputs, BATCH)
    else:
        for _ in prune_blocks([block], inputs.clone(), pruner(), Goal(0.5), BATCH):
            pass
    weights = sum(linear.weight.nbytes for linear in block.linears.values())
    return {"seconds": time.process_time() - began, "added": (peak() - before) / weights, "block_bytes": weights}


def peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--only", choices=METHODS, help="measure one in this process and print it as JSON")
    given = parser.parse_args()
    if not (MODEL / "config.json").is_file():
        sys.exit(f"no model in {MODEL}: make real-model")
    if given.only:
        print(json.dumps(measured(given.only, *block_and_inputs(given.block, given.samples, given.length))))
        return
    sizes = ["--block", str(given.block), "--samples", str(given.samples), "--length", str(given.length)]
    found = {}
    for method in METHODS:
        command = [sys.executable, __file__, *sizes, "--only", method]
        found[method] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found[method]["ratio"] = found[method]["seconds"] / found["two passes"]["seconds"]
    rows = [[name, *(f"{row[key]:.2f}" for key in ("seconds", "ratio", "added"))] for name, row in found.items()]
    titles = ["method", "processor seconds", "to two passes", "memory added, in weights of the block"]
    print("\n".join(markdown_table(titles, rows)))
    record = {"machine": describe_machine(torch.device("cpu")), **vars(given), "methods": found}
    record.pop("only")
    (HERE / "real_block.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
