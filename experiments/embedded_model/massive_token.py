"""Trains a model of the embedded one's shape on windows that hold no BOS, and measures whether it gets a massive token
(Sun et al., arXiv 2402.17762). Writes massive_token.json beside this file.

    python experiments/embedded_model/massive_token.py --minutes 25

AdamW takes all weights, as most large models were trained, where the shipped one has Muon for its matrices. A window
begins anywhere in a document, so that its first token is as any other but for its place.
Measured after each block but the last on 64 held-out windows: the largest state's norm as a multiple of the median.
"""

import argparse
import json
import time
from pathlib import Path

import numpy
import torch
from llama import model_config
from tokenizer import BOS, EOS, encode, load_or_train_tokenizer
from train import BF16, HERE, SHORT_WINDOW, token_loss, window_batches
from transformers import LlamaForCausalLM

from besa_exp.texts.embedded.text import TRAINING_PACKAGES, embedded_text, perplexity_documents

RESULTS = HERE / "massive_token.json"
SHAPE = argparse.Namespace(hidden=192, intermediate=512, blocks=5, heads=6, kv_heads=2)
ADAMW_LR, WARM_UP = 0.003, 200  # the steps until the step size is reached; constant after that
SECONDS = 120.0  # between two measurements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="cache of the tokens and the tokenizer")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    corpus, held_out_text = embedded_text("train", TRAINING_PACKAGES), perplexity_documents()
    tokenizer = load_or_train_tokenizer(corpus.documents, asked.work / "tokenizer")
    marks = torch.tensor(tokenizer.convert_tokens_to_ids([BOS, EOS]))
    tokens, held_out = (without(encode(tokenizer, text, asked.work), marks) for text in (corpus, held_out_text))
    model = LlamaForCausalLM(model_config(tokenizer, SHAPE))
    model.set_attn_implementation("eager")  # the faster one in short windows
    course = train(model, tokens, held_out, asked.minutes)
    found = {"window": SHORT_WINDOW, "lr": ADAMW_LR, "bf16_products": BF16, "course": course}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def without(stream: Path, marks: torch.Tensor) -> torch.Tensor:
    """The stream's tokens but for the marks between documents."""
    tokens = torch.from_numpy(numpy.load(stream).astype(numpy.int64))
    return tokens[~torch.isin(tokens, marks)]


def train(model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor, minutes: float) -> list[dict]:
    """Trains for so long; the measurements, every SECONDS."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    batches, probe = window_batches(tokens, SHORT_WINDOW, 32, seed=0), held_out.unfold(0, SHORT_WINDOW + 1, 127)[:64]
    course: list[dict] = []
    start, step, seen = time.monotonic(), 0, 0
    while (elapsed := time.monotonic() - start) < 60 * minutes or not course:
        if elapsed >= len(course) * SECONDS:
            course.append({"seconds": round(elapsed), "steps": step, "tokens": seen, **measured(model, probe)})
            print(json.dumps(course[-1]), flush=True)
        batch = next(batches)
        optimizer.param_groups[0]["lr"] = ADAMW_LR * min(1.0, (step + 1) / WARM_UP)
        token_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + batch.shape[0] * SHORT_WINDOW
    course.append({"seconds": round(elapsed), "steps": step, "tokens": seen, **measured(model, probe)})
    return course


@torch.no_grad()
def measured(model: LlamaForCausalLM, probe: torch.Tensor) -> dict:
    """The loss; by block, the largest state's norm as a multiple of the median, and which share of these states is a
    window's first; the first tokens' part of all energy after the block where it is largest."""
    states = model(input_ids=probe[:, :-1], output_hidden_states=True, use_cache=False).hidden_states[1:-1]
    norms = [state.float().norm(dim=-1) for state in states]
    largest = [norm.amax(dim=1, keepdim=True) / norm.median() for norm in norms]
    return {
        "loss": round(token_loss(model, probe).item(), 4),
        "largest_over_median": [round(float(ratio.mean()), 2) for ratio in largest],
        "first_is_largest": [round(float((norm.argmax(dim=1) == 0).float().mean()), 2) for norm in norms],
        "energy_of_the_first": round(max(float((n[:, 0] ** 2).sum() / (n**2).sum()) for n in norms), 4),
    }


if __name__ == "__main__":
    main()
