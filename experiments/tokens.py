"""Makes the exact tokens that a study calibrates and scores its models on.

Each document is BOS + text; documents are laid one after the other and cut into windows of 256. A seed draws windows
for calibration from the first ones, so that a larger set holds the smaller ones. Held out are the first windows of the
test stories, for the embedded model of its own perplexity set.

real_model: windows of 512 tokens of WikiText-2's validation text, at random places, to calibrate on; the first windows
of 1,024 tokens of its test text and of C4 are held out. No BOS, which the model was trained without.

first_results (best and budgets too): TinyStories for the two models that are not part of the project. paper: several
sizes of the model's own source, and other sources at one size, for these two and the embedded model.

    python experiments/tokens.py first_results|paper|real_model [--shared ../shared] [--out outputs/<study>/tokens]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from besa_exp.texts.embedded.text import MODEL_DIR, calibration_documents, perplexity_documents
from besa_exp.texts.tokens import write_token_file

TINYSTORIES_MODELS = ("babyllama-105", "stories260K")
SEQ_LEN, SEEDS = 256, 3
SETS = (
    ("calibration", 32, 512),
    ("calibration-large", 128, 1024),
    ("calibration-small", 4, 512),
    ("calibration-medium", 64, 1024),
)  # windows, their tokens
REAL_MODEL = Path("outputs/models/smollm2-135m-instruct")  # make real-model


def first_results(shared: Path, out: Path) -> None:
    """For each model calibration-<seed>.safetensors, tuning.safetensors, which they are drawn from, and
    held-out.safetensors."""
    for name in TINYSTORIES_MODELS:
        tokenizer, folder = AutoTokenizer.from_pretrained(shared / "models" / name), made(out / name)
        pool = windows(tokenizer, stories(shared, "valid"), 600)
        draw(pool, {128: "calibration-{seed}"}, folder)
        write_token_file(pool, folder / "tuning.safetensors")
        write_token_file(windows(tokenizer, stories(shared, "test"), 200), folder / "held-out.safetensors")


def paper(shared: Path, out: Path) -> None:
    """<source>-<windows>-<seed>.safetensors and held-out.safetensors for each model."""
    for name in (*TINYSTORIES_MODELS, "embedded"):
        embedded = name == "embedded"
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR if embedded else shared / "models" / name)
        folder, own_source = made(out / name), "embedded" if embedded else "tinystories"
        for source, documents in sources(shared).items():
            sizes = (8, 16, 32, 64) if source == own_source else (32,)
            files = {size: f"{source}-{size}-{{seed}}" for size in sizes}
            draw(windows(tokenizer, documents, 300), files, folder)
        held_out = perplexity_documents().documents if embedded else stories(shared, "test")
        write_token_file(windows(tokenizer, held_out, 100), folder / "held-out.safetensors")


def real_model(shared: Path, out: Path) -> None:
    """calibration-<seed>.safetensors, a large set beside it, a small one for searches that run the model many times,
    and wikitext2 and c4, held out."""
    if not REAL_MODEL.is_dir():
        sys.exit(f"no model in {REAL_MODEL}: make real-model")
    tokenizer, folder = AutoTokenizer.from_pretrained(REAL_MODEL), made(out)
    raw, c4 = shared / "data" / "wikitext2", shared / "data" / "c4" / "c4_docs.jsonl"
    valid, test = (
        whole_text(tokenizer, (raw / f"wiki.{part}.raw").read_text(encoding="utf-8")) for part in ("valid", "test")
    )
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        for name, count, length in SETS:
            starts = torch.randint(0, len(valid) - length, (count,), generator=generator).tolist()
            drawn = torch.stack([valid[start : start + length] for start in starts])
            write_token_file(drawn, folder / f"{name}-{seed}.safetensors")
    documents = (json.loads(line)["text"] for line in c4.open(encoding="utf-8"))
    for name, ids in (("wikitext2", test), ("c4", whole_text(tokenizer, "\n\n".join(documents)))):
        write_token_file(ids[: 16 * 1024].view(16, 1024), folder / f"{name}.safetensors")


def whole_text(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The tokens of one text [token]."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def sources(shared: Path) -> dict[str, Iterable[str]]:
    """The documents of each source; WikiText-2 is one text."""
    wikitext2, c4 = shared / "data" / "wikitext2" / "wiki.train.tokens", shared / "data" / "c4" / "c4_docs.jsonl"
    return {
        "tinystories": stories(shared, "valid"),
        "c4": (json.loads(line)["text"] for line in c4.open(encoding="utf-8")),
        "wikitext2": [wikitext2.read_text(encoding="utf-8")[:1_000_000]],
        "embedded": calibration_documents().documents,
    }


def stories(shared: Path, split: str) -> list[str]:
    """TinyStories, valid or test."""
    return (shared / "data" / "tinystories" / f"{split}.txt").read_text(encoding="utf-8").split("<|endoftext|>")


def windows(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], count: int) -> torch.Tensor:
    """The first `count` windows of the documents [window, seq]."""
    ids: list[int] = []
    for document in documents:
        if document.strip():
            ids += [tokenizer.bos_token_id, *tokenizer.encode(document.strip(), add_special_tokens=False)]
        if len(ids) >= count * SEQ_LEN:
            return torch.tensor(ids[: count * SEQ_LEN]).view(count, SEQ_LEN)
    raise SystemExit(f"too little text for {count} windows of {SEQ_LEN} tokens: {len(ids)} tokens")


def draw(pool: torch.Tensor, files: dict[int, str], folder: Path) -> None:
    """Writes a file of so many windows of the pool for each seed."""
    for seed in range(SEEDS):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        for size, name in files.items():
            write_token_file(pool[order[:size]], folder / f"{name.format(seed=seed)}.safetensors")


def made(folder: Path) -> Path:
    """The folder, there from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"tokens in {folder}")
    return folder


MODELS_AND_STORIES = (*(f"models/{name}" for name in TINYSTORIES_MODELS), "data/tinystories")
C4 = "data/c4/c4_docs.jsonl"
NEEDED = {
    "first_results": MODELS_AND_STORIES,
    "paper": (*MODELS_AND_STORIES, C4, "data/wikitext2/wiki.train.tokens"),
    "real_model": (C4, "data/wikitext2/wiki.valid.raw", "data/wikitext2/wiki.test.raw"),
}  # within `shared`
STUDIES = {"first_results": first_results, "paper": paper, "real_model": real_model}


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the tokens of one study. Ends the program where what they are made of is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("BESA_SHARED", "../shared")))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if missing := [place for place in NEEDED[given.study] if not (given.shared / place).exists()]:
        sys.exit(f"{given.shared} has no {', '.join(missing)}; name a folder that has: --shared FOLDER or BESA_SHARED=")
    STUDIES[given.study](given.shared, given.out or Path("outputs") / given.study / "tokens")


if __name__ == "__main__":
    main()
