"""Is the embedded model worth pruning? Perplexity and zero-shot accuracy of the dense model and of magnitude pruning.

Every linear of every block loses the given share of its weights, those of least magnitude. Perplexity is exp of the
mean loss per token over the embedded held-out set, cut into windows of 512 tokens that follow one another. Scores are
taken in fp32 from the shipped bf16 weights.

    python experiments/embedded_model/check.py --out experiments/embedded_model/check.json
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from besa_exp.texts.embedded.text import (
    MODEL_DIR,
    TASK_NAME,
    TASKS_DIR,
    EmbeddedText,
    calibration_documents,
    perplexity_documents,
)

WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.6, 0.7])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "check.json")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text, calibration = perplexity_documents(), calibration_documents()
    tokens = stream(tokenizer, text)
    rows = [row(arguments.model, tokenizer, tokens, sparsity) for sparsity in arguments.sparsities]
    for line in rows:
        line["perplexity_increase"] = line["perplexity"] / rows[0]["perplexity"] - 1
        print(json.dumps(line))
    result = {
        "rows": rows,
        "perplexity_set": {"tokens": len(tokens), "sha256": text.sha256, "versions": text.versions},
        "calibration_set": {"tokens": len(stream(tokenizer, calibration)), "sha256": calibration.sha256},
        "threads": torch.get_num_threads(),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def row(folder: Path, tokenizer, tokens: torch.Tensor, sparsity: float) -> dict:
    """All figures of one sparsity."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    zeros, weights = prune_by_magnitude(model, sparsity)
    start = time.monotonic()
    loss = mean_loss(model, tokens)
    seconds = {"perplexity": time.monotonic() - start}
    start = time.monotonic()
    evaluate: Any = simple_evaluate  # decorators hide both signatures from a type checker
    loaded: Any = HFLM
    scores = evaluate(
        model=loaded(pretrained=model, tokenizer=tokenizer, batch_size=64),
        tasks=[TASK_NAME],
        task_manager=TaskManager(include_path=str(TASKS_DIR)),
        bootstrap_iters=0,
    )["results"][TASK_NAME]
    seconds["zero_shot"] = time.monotonic() - start
    return {
        "sparsity": sparsity,
        "measured_sparsity": zeros / weights,
        "block_weights": weights,
        "perplexity": math.exp(loss),
        "loss": loss,
        "acc": scores["acc,none"],
        "acc_norm": scores["acc_norm,none"],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


@torch.no_grad()
def prune_by_magnitude(model: PreTrainedModel, sparsity: float) -> tuple[int, int]:
    """Zeroes the floor(sparsity * n) smallest of each block linear's n weights; returns (zeros, weights) in total."""
    zeros = weights = 0
    for block in model.model.layers:
        for linear in (module for module in block.modules() if isinstance(module, torch.nn.Linear)):
            flat = linear.weight.view(-1)
            flat[flat.abs().argsort(stable=True)[: int(sparsity * flat.numel())]] = 0
            zeros += int((flat == 0).sum())
            weights += flat.numel()
    return zeros, weights


@torch.no_grad()
def mean_loss(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Nats per token over consecutive windows."""
    losses = []
    for batch in tokens.unfold(0, WINDOW + 1, WINDOW).split(8):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        losses.append(cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").flatten())
    return torch.cat(losses).double().mean().item()


def stream(tokenizer, text: EmbeddedText) -> torch.Tensor:
    """int64 token ids of all documents: BOS, document, EOS, and so on."""
    ids = [[*tokenizer(document).input_ids, tokenizer.eos_token_id] for document in text.documents]
    return torch.tensor([token for document in ids for token in document])


if __name__ == "__main__":
    main()
