"""Tunes pruned models by each method at equal tokens, in one process; what is done is not done again.

    python experiments/recovery/study.py stories260K|babyllama-105|embedded [--steps 60] [--shared ../shared]

Each start is pruned once. Step sizes are those that each recovery finds by its own trial on the held-out windows, alike
for all methods. Writes outputs/recovery/<model>.json, which `collect.py` reads: perplexity of windows that neither
pruning nor tuning has seen, tokens, processor seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import besa_exp
from besa_exp.evaluation.perplexity import perplexity
from besa_exp.texts.embedded.text import MODEL_DIR, calibration_documents, perplexity_documents

sys.path.insert(0, str(Path(__file__).parents[1]))
from collect import METHODS
from tokens import stories, windows

STARTS: dict[str, tuple[str, float, str]] = {
    "wanda 60%": ("wanda", 0.6, "unstructured"),
    "besa 60%": ("besa", 0.6, "unstructured"),
    "wanda 2:4": ("wanda", 0.5, "2:4"),
    "besa 70%": ("besa", 0.7, "unstructured"),
    "wanda 70%": ("wanda", 0.7, "unstructured"),
    "wanda 50%": ("wanda", 0.5, "unstructured"),
    "besa 50%": ("besa", 0.5, "unstructured"),
    "besa 2:4": ("besa", 0.5, "2:4"),
}
REMOVED = "shortgpt, one block"
SEQ_LEN, CALIBRATION, BATCH, HELD_OUT = 128, 128, 8, 16


class Study:
    """One model, its text, and the records so far."""

    def __init__(self, name: str, shared: Path, steps: int) -> None:
        self.folder = MODEL_DIR if name == "embedded" else shared / "models" / name
        self.steps, self.path = steps, Path("outputs/recovery") / f"{name}.json"
        embedded = name == "embedded"
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        pool = calibration_documents().documents if embedded else stories(shared, "valid")
        scored = perplexity_documents().documents if embedded else stories(shared, "test")
        needed = CALIBRATION + steps * BATCH + HELD_OUT
        self.pool = windows(self.tokenizer, pool, -(-needed * SEQ_LEN // 256)).view(-1, SEQ_LEN)
        self.scored = windows(self.tokenizer, scored, 40)
        self.records: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def dense(self) -> PreTrainedModel:
        """The model as it comes."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval().requires_grad_(False)

    def perplexity(self, model: PreTrainedModel) -> float:
        """Of the windows that are scored."""
        return perplexity(model, self.scored, 256, 8).value

    def keep(self, key: str, record: dict[str, Any]) -> None:
        """On the disk too."""
        self.records[key] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.records, indent=1) + "\n", encoding="utf-8")
        print(key, record, flush=True)

    def pruned(self, start: str) -> PreTrainedModel:
        """The model of a start."""
        calibration = self.pool[:CALIBRATION]
        if start == REMOVED:
            with tempfile.TemporaryDirectory() as folder:
                structure = replace(besa_exp.preset("structure", "shortgpt"), blocks=1, ratio=None)
                out = Path(folder) / "run"
                besa_exp.prune(self.folder, None, calibration, pruner="dense", structure=structure, out=out)
                return AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).requires_grad_(False)
        pruner, sparsity, pattern = STARTS[start]
        model = self.dense()
        besa_exp.prune(model, None, calibration, pruner=pruner, sparsity=sparsity, pattern=pattern)
        return model

    def tuned(self, start: str, pruned: PreTrainedModel, method: str) -> None:
        """Tune a copy, and record what became of it."""
        key = f"{start} | {method}"
        if key not in self.records:
            asked = besa_exp.preset("recovery", method)
            asked = replace(asked, steps=self.steps, batch_size=BATCH, held_out=HELD_OUT, checks=6, seq_len=SEQ_LEN)
            model, began = copy.deepcopy(pruned), time.process_time()
            teacher = self.dense() if method == "blocks" else None
            text = self.pool[CALIBRATION:]
            report = besa_exp.tune(model, None, text, recovery=asked, teacher=teacher, dense=start == REMOVED)
            self.keep(
                key,
                {
                    "start": start,
                    "method": method,
                    "lr": report.lr,
                    "perplexity": self.perplexity(model),
                    "held_out": [report.loss_before, report.loss_after],
                    "best_step": report.best_step,
                    "tokens": report.tokens,
                    "stopped": report.stopped,
                    "seconds": time.process_time() - began,
                },
            )

    def run(self) -> None:
        """All of it."""
        if "dense" not in self.records:
            self.keep("dense", {"start": "dense", "method": None, "perplexity": self.perplexity(self.dense())})
        for start in (*STARTS, REMOVED):
            model = self.pruned(start)
            if start not in self.records:
                self.keep(start, {"start": start, "method": None, "perplexity": self.perplexity(model)})
            for method in self._methods(start):
                self.tuned(start, model, method)

    def _methods(self, start: str) -> Iterator[str]:
        """`blocks` compares blocks, of which one is gone; entries of a dense model have no mask to stay in."""
        return (method for method in METHODS if start != REMOVED or method != "blocks")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("stories260K", "babyllama-105", "embedded"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("BESA_SHARED", "../shared")))
    given = parser.parse_args()
    torch.set_num_threads(1)
    Study(given.model, given.shared, given.steps).run()
