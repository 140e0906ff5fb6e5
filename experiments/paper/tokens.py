"""Makes the exact tokens that the study calibrates and scores its models on.

Each document is BOS + text; documents are laid one after the other and cut into windows of 256. A seed draws windows of
each source for calibration, so that a larger set holds the smaller ones. Held out are the first 100 windows of the test
stories, for the embedded model of its own perplexity set.

    python experiments/paper/tokens.py [--shared ../shared] [--out outputs/paper/tokens]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoTokenizer

from besa_exp.embedded.text import MODEL_DIR, calibration_documents, perplexity_documents
from besa_exp.tokens import write_token_file

MODELS = {"babyllama-105": "tinystories", "stories260K": "tinystories", "embedded": "embedded"}  # and its own source
SEQ_LEN, POOL_WINDOWS, HELD_OUT_WINDOWS, SEEDS = 256, 300, 100, 3
SIZES = (8, 16, 32, 64)
SIZE_OF_OTHERS = 32  # windows of the sources that are compared at one size


def stories(path: Path) -> list[str]:
    """The stories of a file."""
    return path.read_text(encoding="utf-8").split("<|endoftext|>")


def sources(data: Path) -> dict[str, Iterable[str]]:
    """The documents of each source; WikiText-2 is one text."""
    return {
        "tinystories": stories(data / "tinystories" / "valid.txt"),
        "c4": (json.loads(line)["text"] for line in (data / "c4" / "c4_docs.jsonl").open(encoding="utf-8")),
        "wikitext2": [(data / "wikitext2" / "wiki.train.tokens").read_text(encoding="utf-8")[:1_000_000]],
        "embedded": calibration_documents().documents,
    }


def windows(tokenizer, documents: Iterable[str], count: int) -> torch.Tensor:
    """The first `count` windows of the documents [window, seq]."""
    ids: list[int] = []
    for document in documents:
        if document.strip():
            ids += [tokenizer.bos_token_id, *tokenizer.encode(document.strip(), add_special_tokens=False)]
        if len(ids) >= count * SEQ_LEN:
            return torch.tensor(ids[: count * SEQ_LEN]).view(count, SEQ_LEN)
    raise SystemExit(f"too little text for {count} windows of {SEQ_LEN} tokens: {len(ids)} tokens")


def main() -> None:
    """Writes <source>-<windows>-<seed>.safetensors and held-out.safetensors for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("BESA_SHARED", "../shared")))
    parser.add_argument("--out", type=Path, default=Path("outputs/paper/tokens"))
    arguments = parser.parse_args()
    data = arguments.shared / "data"
    for name, own_source in MODELS.items():
        embedded = name == "embedded"
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR if embedded else arguments.shared / "models" / name)
        folder = arguments.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for source, documents in sources(data).items():
            pool = windows(tokenizer, documents, POOL_WINDOWS)
            for seed in range(SEEDS):
                order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
                for size in SIZES if source == own_source else (SIZE_OF_OTHERS,):
                    write_token_file(pool[order[:size]], folder / f"{source}-{size}-{seed}.safetensors")
        texts = perplexity_documents().documents if embedded else stories(data / "tinystories" / "test.txt")
        write_token_file(windows(tokenizer, texts, HELD_OUT_WINDOWS), folder / "held-out.safetensors")
        print(f"{name}: tokens in {folder}")


if __name__ == "__main__":
    main()
