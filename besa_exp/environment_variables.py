"""Environment variables that libraries read once, when they are imported or first used."""

from __future__ import annotations

import os


def set_before_imports(offline: bool) -> None:
    """To be called before transformers, datasets or huggingface_hub are imported and before CUDA is used."""
    if offline:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a forked tokenizer warns and may hang
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms on a GPU need it
