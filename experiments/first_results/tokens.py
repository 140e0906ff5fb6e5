"""Makes the exact tokens that the study calibrates and scores the two TinyStories models on.

Each story is BOS + text; stories are laid one after the other and cut into windows of 256. A seed draws 128 windows of
the validation stories for calibration; the first 200 windows of the test stories are held out.

    python experiments/first_results/tokens.py [--shared ../shared] [--out outputs/first_results/tokens]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from transformers import AutoTokenizer

from besa_exp.tokens import write_token_file

MODELS = ("babyllama-105", "stories260K")
SEQ_LEN, CALIBRATION_WINDOWS, POOL_WINDOWS, HELD_OUT_WINDOWS, SEEDS = 256, 128, 600, 200, 3


def windows(tokenizer, path: Path, count: int) -> torch.Tensor:
    """The first `count` windows of the stories in `path` [window, seq]."""
    ids: list[int] = []
    for story in path.read_text(encoding="utf-8").split("<|endoftext|>"):
        if story.strip():
            ids += [tokenizer.bos_token_id, *tokenizer.encode(story.strip(), add_special_tokens=False)]
        if len(ids) >= count * SEQ_LEN:
            return torch.tensor(ids[: count * SEQ_LEN]).view(count, SEQ_LEN)
    raise SystemExit(f"{path}: too little text for {count} windows of {SEQ_LEN} tokens")


def main() -> None:
    """Writes calibration-<seed>.safetensors and held-out.safetensors for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("BESA_SHARED", "../shared")))
    parser.add_argument("--out", type=Path, default=Path("outputs/first_results/tokens"))
    arguments = parser.parse_args()
    for name in MODELS:
        tokenizer = AutoTokenizer.from_pretrained(arguments.shared / "models" / name)
        stories, folder = arguments.shared / "data" / "tinystories", arguments.out / name
        folder.mkdir(parents=True, exist_ok=True)
        pool = windows(tokenizer, stories / "valid.txt", POOL_WINDOWS)
        for seed in range(SEEDS):
            chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_WINDOWS]
            write_token_file(pool[chosen], folder / f"calibration-{seed}.safetensors")
        write_token_file(windows(tokenizer, stories / "test.txt", HELD_OUT_WINDOWS), folder / "held-out.safetensors")
        print(f"{name}: tokens in {folder}")


if __name__ == "__main__":
    main()
