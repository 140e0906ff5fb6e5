"""Environment variables that libraries read once, when they are imported or first used."""

from __future__ import annotations

import os


def set_before_imports(offline: bool) -> None:
    """To be called before transformers, datasets, huggingface_hub or wandb are imported and before CUDA is used."""
    if offline:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
        os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", WANDB_ERROR_REPORTING="false")
        if os.environ.get("WANDB_MODE") != "disabled":
            os.environ["WANDB_MODE"] = "offline"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a forked tokenizer warns and may hang
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms on a GPU need it
